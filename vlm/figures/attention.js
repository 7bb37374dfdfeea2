function (root) {
  "use strict";
  if (!root) return;
  const steps = JSON.parse(
    root.querySelector('script[type="application/json"]').textContent
  );
  const stage = root.querySelector(".vlm-look-stage");
  const veil = stage.querySelector(".vlm-look-veil");
  const marks = stage.querySelector(".vlm-look-marks");
  const note = root.querySelector(".vlm-look-note");
  const row = root.querySelector(".vlm-look-tokens");
  const buttons = Array.from(row.querySelectorAll("button"));
  const accent = "var(--vlm-suffix, #009E73)";

  // A white line under each colored one, so that it can be seen on any picture.
  function draw(tag, values, color, wide, dash) {
    for (const [stroke, extra] of [["#fff", 2], [color, 0]]) {
      const shape = document.createElementNS("http://www.w3.org/2000/svg", tag);
      for (const [key, value] of Object.entries(values)) shape.setAttribute(key, value);
      shape.setAttribute("fill", "none");
      shape.setAttribute("stroke-width", wide + extra);
      shape.setAttribute("vector-effect", "non-scaling-stroke");
      shape.style.stroke = stroke;
      if (dash) shape.setAttribute("stroke-dasharray", dash);
      marks.append(shape);
    }
  }

  function show(index) {
    const step = steps[index];
    veil.setAttribute("href", step.veil);
    note.textContent = step.note;
    marks.replaceChildren();
    step.lines.forEach(([x1, y1, x2, y2], i) => {
      const own = step.own && i === step.lines.length - 1;
      draw("line", { x1, y1, x2, y2 }, accent, own ? 3 : 1.2, own ? null : "5 4");
    });
    step.boxes.forEach(([x, y, width, height]) =>
      draw("rect", { x, y, width, height }, accent, 2.5));
    buttons.forEach((button, i) => {
      const chosen = i === index;
      button.setAttribute("aria-pressed", String(chosen));
      button.tabIndex = chosen ? 0 : -1;
    });
  }

  buttons.forEach((button, i) => {
    for (const event of ["click", "focus", "mouseenter"]) {
      button.addEventListener(event, () => show(i));
    }
  });
  row.addEventListener("keydown", (event) => {
    const here = buttons.indexOf(document.activeElement);
    const last = buttons.length - 1;
    const next = {
      ArrowRight: Math.min(here + 1, last),
      ArrowDown: Math.min(here + 1, last),
      ArrowLeft: Math.max(here - 1, 0),
      ArrowUp: Math.max(here - 1, 0),
      Home: 0,
      End: last,
    }[event.key];
    if (next === undefined || here < 0) return;
    event.preventDefault();
    event.stopPropagation();  // JupyterLab would move between cells
    buttons[next].focus();
  });

  row.style.display = "flex";
  root.querySelector(".vlm-look-strip").style.display = "none";
  show(0);
}
