function (root) {
  "use strict";
  if (!root) return;
  // The mask's codes, and a sprite with a tile for each token (rows) and each code
  // (columns) that the token may become.
  const { codes, side, levels, sprite } = JSON.parse(
    root.querySelector('script[type="application/json"]').textContent
  );
  const SIZE = 288; // pixels of the large mask
  const THUMB = 24; // and of a small one
  const seg = (code) => "<seg" + String(code).padStart(3, "0") + ">";
  const element = (tag, properties = {}, ...children) => {
    const made = Object.assign(document.createElement(tag), properties);
    made.append(...children);
    return made;
  };

  const state = { token: 5, code: codes[5] };
  const buttons = codes.map((code, token) => {
    const label = element("span");
    const button = element("button", { type: "button", tabIndex: -1 }, label);
    button.setAttribute("role", "radio");
    button.onclick = () => choose(token, codes[token]);
    return button;
  });
  const cells = element("div", { className: "cells" }, ...buttons);
  cells.setAttribute("role", "radiogroup");
  cells.setAttribute("aria-label", "The sixteen tokens; arrow keys choose one");
  cells.onkeydown = (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -4, ArrowDown: 4 }[event.key];
    if (!step) return;
    event.preventDefault();
    const token = (state.token + step + 16) % 16;
    choose(token, codes[token]);
    buttons[token].focus();
  };
  const large = element("canvas", { width: SIZE, height: SIZE });
  const all = element("canvas", { width: 16 * THUMB, height: 8 * THUMB });
  const marks = [element("i", { className: "first" }), element("i")];
  const palette = element("div", { className: "codes" }, all, ...marks);
  for (const part of [large, palette]) part.setAttribute("aria-hidden", "true");
  all.title = "All 128 codes for this token; click one";
  all.onclick = (event) => {
    const box = all.getBoundingClientRect();
    const column = Math.floor(((event.clientX - box.left) / box.width) * 16);
    const row = Math.floor(((event.clientY - box.top) / box.height) * 8);
    choose(state.token, Math.min(127, Math.max(0, row * 16 + column)));
  };
  const slider = element("input", { type: "range", min: 0, max: 127 });
  slider.oninput = () => choose(state.token, Number(slider.value));
  slider.onkeydown = (event) => event.stopPropagation();  // JupyterLab takes arrow keys
  const where = element("span");
  const back = element("button", { type: "button", className: "back" }, "Put it back");
  back.onclick = () => choose(state.token, codes[state.token]);
  const words = element("p");
  words.setAttribute("aria-live", "polite");
  const text = element("code");
  const key = (name) => {
    const made = element("span", { className: "key" });
    made.style.background = `var(--${name})`;
    return made;
  };
  const legend = element("p", {}, key("kept"), "stays", key("gained"), "comes", key("lost"), "goes");

  // Tiles of numbers: 0 is the border, more is inside.
  let pixels = null; // the sprite's, row by row
  const half = (levels - 1) / 2;
  const raw = (token, code, x, y) =>
    pixels[4 * ((token * side + y) * 128 * side + code * side + x)];
  const start = new Float32Array(side * side);
  const tile = (token, code) => {
    if (code === codes[token]) return start;
    const values = new Float32Array(side * side);
    for (let y = 0; y < side; y++)
      for (let x = 0; x < side; x++) {
        const i = y * side + x;
        values[i] = ((start[i] + half + raw(token, code, x, y)) & 255) - half;
      }
    return values;
  };
  // A tile's value at (x, y), both from 0 to 1, between the middles of its pixels.
  const at = (values, x, y) => {
    const inside = (v) => Math.min(side - 1, Math.max(0, v * side - 0.5));
    const [u, v] = [inside(x), inside(y)];
    const [i, j] = [Math.floor(u), Math.floor(v)];
    const [k, l] = [Math.min(i + 1, side - 1), Math.min(j + 1, side - 1)];
    const top = values[j * side + i] * (1 - u + i) + values[j * side + k] * (u - i);
    const bottom = values[l * side + i] * (1 - u + i) + values[l * side + k] * (u - i);
    return top * (1 - v + j) + bottom * (v - j);
  };
  const color = (name) => {
    const probe = element("span");
    probe.style.color = `var(--${name})`;
    root.append(probe);
    const numbers = getComputedStyle(probe).color.match(/[\d.]+/g).map(Number);
    probe.remove();
    return numbers;
  };

  // Paint the changed mask over the first one, and count: [flipped, of these outside].
  const paint = (canvas, left, top, size, values, colors) => {
    const context = canvas.getContext("2d");
    const image = context.createImageData(size, size);
    const [row, column] = [Math.floor(state.token / 4), state.token % 4];
    let [flipped, outside] = [0, 0];
    for (let y = 0; y < size; y++)
      for (let x = 0; x < size; x++) {
        const [u, v] = [(x + 0.5) / size, (y + 0.5) / size];
        const [before, now] = [at(start, u, v) > 0, at(values, u, v) > 0];
        if (before !== now) {
          flipped++;
          if (Math.floor(4 * v) !== row || Math.floor(4 * u) !== column) outside++;
        }
        if (before || now) {
          const [r, g, b] = colors[before && now ? "kept" : now ? "gained" : "lost"];
          image.data.set([r, g, b, 255], 4 * (y * size + x));
        }
      }
    context.putImageData(image, left, top);
    return [flipped / size ** 2, outside / Math.max(1, flipped)];
  };

  let drawn = -1; // the token whose 128 codes are shown
  const draw = () => {
    if (!pixels) return;
    const colors = { kept: color("kept"), gained: color("gained"), lost: color("lost") };
    const values = tile(state.token, state.code);
    const [flipped, outside] = paint(large, 0, 0, SIZE, values, colors);
    if (drawn !== state.token) {
      for (let code = 0; code < 128; code++) {
        const [x, y] = [THUMB * (code % 16), THUMB * Math.floor(code / 16)];
        paint(all, x + 1, y + 1, THUMB - 2, tile(state.token, code), colors);
      }
      drawn = state.token;
    }
    [codes[state.token], state.code].forEach((code, i) => {
      marks[i].style.left = `${(code % 16) * 6.25}%`;
      marks[i].style.top = `${Math.floor(code / 16) * 12.5}%`;
    });
    const changed = state.code !== codes[state.token];
    const percent = (share) => (100 * share).toFixed(share < 0.1 ? 1 : 0) + " %";
    words.textContent = changed
      ? `${seg(codes[state.token])} became ${seg(state.code)}: ${percent(flipped)} of the ` +
        `square changed sides, and ${percent(outside)} of that lies outside the ` +
        "token's own cell."
      : "The mask as it was encoded. Move the slider, or click a small mask.";
    back.disabled = !changed;
    slider.value = state.code;
    where.textContent = `Token ${state.token + 1} of 16: ${seg(state.code)}`;
    slider.setAttribute("aria-valuetext", seg(state.code));
    const now = codes.map((code, token) => (token === state.token ? state.code : code));
    buttons.forEach((button, token) => {
      const chosen = token === state.token;
      button.firstChild.textContent = String(now[token]).padStart(3, "0");
      button.setAttribute("aria-checked", String(chosen));
      button.setAttribute("aria-label", `token ${token + 1}, ${seg(now[token])}`);
      button.tabIndex = chosen ? 0 : -1;
    });
    const parts = now.map((code, token) =>
      element(token === state.token ? "b" : "span", {}, seg(code), "\u200b")
    );
    text.replaceChildren(...parts);
  };
  const choose = (token, code) => {
    Object.assign(state, { token, code });
    draw();
  };

  const picture = new Image();
  picture.onload = () => {
    const canvas = element("canvas", { width: 128 * side, height: 16 * side });
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.drawImage(picture, 0, 0);
    pixels = context.getImageData(0, 0, canvas.width, canvas.height).data;
    for (let i = 0; i < side * side; i++)
      start[i] = raw(0, codes[0], i % side, Math.floor(i / side)) - half;
    const board = element("div", { className: "board" }, large, cells);
    const label = element("label", {}, where, slider);
    const panel = element("div", { className: "side" }, label, palette, legend, words, back);
    const columns = element("div", { className: "columns" }, board, panel);
    root.replaceChildren(columns, element("p", {}, text));
    draw();
    const redraw = () => {
      drawn = -1;
      draw();
    };
    // The theme's button sets an attribute of the page.
    new MutationObserver(redraw).observe(document.documentElement, {
      attributeFilter: ["data-theme"],
    });
  };
  picture.src = sprite;
}
