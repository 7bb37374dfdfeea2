// The widget manager typesets labels through MathJax 2's queue. The book carries MathJax
// 3: answer in its place. Runs before embed.js, so its listener is called first.
window.addEventListener("load", () => {
  const mathjax = window.MathJax;
  if (mathjax && !mathjax.Hub) {
    mathjax.Hub = {
      Queue: (job) => mathjax.typesetPromise && mathjax.typesetPromise([job[2]]),
    };
  }
});
