// The tools of the mask, and all of it by keyboard: the arrow keys move a cursor, which paints while Space is held.

import { $ } from "./dom.js";
import { clear, invert, penDown, penTo, penUp, redo, scale, undo } from "./mask.js";

const canvas = $("mask"), brush = $("brush"), cursor = $("cursor");
const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
const KEYS = {
  "[": () => resize(-4), "]": () => resize(4), e: () => $("eraser").click(), i: invert, delete: clear,
  "ctrl z": undo, "ctrl shift z": redo, "ctrl y": redo,
};
Object.entries({ undo, redo, invert, clear }).forEach(([id, tool]) => { $(id).onclick = tool; });

let at = [0.5, 0.5]; // of the width and height
let isDown = false;

function resize(by) {
  brush.value = Number(brush.value) + by;
  brushChanged();
}

/** The pointer and the cursor as large as the brush. */
function brushChanged() {
  const size = Number(brush.value), half = size / 2;
  const ring = `<circle cx='${half}' cy='${half}' r='${half - 1}' fill='none' stroke='gray' stroke-width='2'/>`;
  const drawing = `<svg xmlns='http://www.w3.org/2000/svg' width='${size}' height='${size}'>${ring}</svg>`;
  canvas.style.cursor = `url("data:image/svg+xml,${drawing}") ${half} ${half}, crosshair`;
  cursor.style.width = cursor.style.height = `${size}px`;
}

function show() {
  cursor.hidden = false;
  cursor.style.left = `${100 * at[0]}%`;
  cursor.style.top = `${100 * at[1]}%`;
  if (isDown) penTo(at[0] * canvas.width, at[1] * canvas.height);
}

function move([right, down], step) {
  const size = [canvas.width, canvas.height];
  at = [right, down].map((way, axis) => Math.min(1, Math.max(0, at[axis] + way * step * scale() / size[axis])));
  show();
}

function space() {
  if (isDown) return; // the key repeats
  isDown = true;
  penDown();
  show();
}

function lift() {
  if (isDown) penUp();
  isDown = false;
}

canvas.onkeydown = (event) => {
  const { key, shiftKey } = event;
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (key === " ") space();
  else if (ARROWS[key]) move(ARROWS[key], shiftKey ? 1 : Math.max(4, brush.value / 4));
  else return;
  event.preventDefault();
};
canvas.onkeyup = ({ key }) => { if (key === " ") lift(); };
canvas.addEventListener("blur", () => { lift(); cursor.hidden = true; });
canvas.addEventListener("pointerdown", () => { lift(); cursor.hidden = true; });

$("painting").addEventListener("keydown", (event) => {
  const isCtrl = (event.ctrlKey || event.metaKey) && !event.altKey; // both: AltGr, which types [ on some keyboards
  const tool = KEYS[(isCtrl ? `ctrl ${event.shiftKey ? "shift " : ""}` : "") + event.key.toLowerCase()];
  if (!tool) return;
  event.preventDefault();
  tool();
});
brush.oninput = brushChanged;

brushChanged();
