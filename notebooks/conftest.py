"""What nbmake has executed, `make book` needn't execute again.

A notebook that ran without an error goes to the cache of outputs that the book reads.
"""

from pathlib import Path

from jupyter_cache import get_cache
from jupyter_cache.base import CacheBundleIn
from nbmake import pytest_items
from nbmake.nb_result import NotebookResult
from nbmake.nb_run import NotebookRun

CACHE = Path(__file__).resolve().parent.parent / "_build" / ".jupyter_cache"


class CachedRun(NotebookRun):
    def execute(self) -> NotebookResult:
        result = super().execute()
        if result.error is None:
            for cell in result.nb.cells:  # the cache looks notebooks up by all the rest
                cell.metadata.pop("execution", None)
            bundle = CacheBundleIn(result.nb, str(self.filename))
            get_cache(CACHE).cache_notebook_bundle(
                bundle, check_validity=False, overwrite=True
            )
        return result


pytest_items.NotebookRun = CachedRun
