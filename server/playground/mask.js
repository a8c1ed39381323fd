// The inpainting mask: what is painted over the initial image. The canvas fires `change` when it has changed.

import { $, make } from "./dom.js";
import { History } from "./history.js";

const canvas = $("mask"), ink = canvas.getContext("2d", { willReadFrequently: true }), history = new History(ink);

let stroke = null; // the last point of the stroke that is being painted
let share = 0; // of the picture, that is painted

export const hasPaint = () => share > 0;

/** Pixels of the canvas for one of the screen. */
export const scale = () => canvas.width / canvas.getBoundingClientRect().width;

/** A mask with nothing painted on it, of the shape of a picture of this size. */
export function blankMask({ width, height } = { width: 1, height: 1 }) {
  const scale = 512 / Math.max(width, height);
  Object.assign(canvas, { width: Math.ceil(width * scale), height: Math.ceil(height * scale) });
  $("easel").style.maxWidth = `min(24rem, ${60 * width / height}vh)`;
  history.forget();
  measure();
}

function measure() {
  const { data } = ink.getImageData(0, 0, canvas.width, canvas.height), all = data.length / 4;
  let painted = 0;
  for (let at = 3; at < data.length; at += 4) painted += data[at] / 255;
  share = painted / all;
  $("share").textContent = share ? `${Math.max(1, Math.round(100 * share))} % is painted.` : "Nothing is painted.";
}

function changed() {
  measure();
  canvas.dispatchEvent(new Event("change", { bubbles: true }));
}

/** Begin a stroke, of paint or of the eraser. */
export function penDown(erases = $("eraser").checked) {
  history.keep();
  Object.assign(ink, {
    globalCompositeOperation: erases ? "destination-out" : "source-over", lineWidth: $("brush").value * scale(),
    strokeStyle: "#4457b8", lineCap: "round", lineJoin: "round",
  });
}

/** Go on to a point of the canvas. */
export function penTo(x, y) {
  ink.beginPath();
  ink.moveTo(...(stroke ?? [x - 0.1, y])); // a line without length would not be drawn
  ink.lineTo(x, y);
  ink.stroke();
  stroke = [x, y];
}

export function penUp() {
  stroke = null;
  changed();
}

function fill(how) {
  history.keep();
  Object.assign(ink, { globalCompositeOperation: how, fillStyle: "#4457b8" });
  ink.fillRect(0, 0, canvas.width, canvas.height);
  changed();
}

export const undo = () => { if (history.undo()) changed(); };
export const redo = () => { if (history.redo()) changed(); };
export const invert = () => fill("xor");
export const clear = () => fill("destination-out");

/** A PNG file as a data: URL, white where it is painted. */
export function maskFile() {
  const { width, height } = canvas, copy = make("canvas", { width, height }), white = copy.getContext("2d");
  white.drawImage(canvas, 0, 0);
  for (const [how, color] of [["source-in", "#fff"], ["destination-over", "#000"]]) {
    Object.assign(white, { globalCompositeOperation: how, fillStyle: color });
    white.fillRect(0, 0, width, height);
  }
  return copy.toDataURL("image/png");
}

canvas.onpointerdown = (event) => {
  if (!event.isPrimary || event.button > 0 && event.button !== 5) return; // 5: a pen's eraser
  canvas.setPointerCapture(event.pointerId);
  penDown($("eraser").checked || event.button === 5);
  paint(event);
};
canvas.onpointermove = (event) => { if (stroke && event.isPrimary) paint(event); };
canvas.onpointercancel = () => { if (stroke) history.undo(); }; // two fingers: the page is zoomed
canvas.onlostpointercapture = penUp;

function paint(event) {
  const { left, top } = canvas.getBoundingClientRect(), moves = event.getCoalescedEvents?.() ?? [];
  for (const { clientX, clientY } of moves.length ? moves : [event]) penTo((clientX - left) * scale(), (clientY - top) * scale());
}
