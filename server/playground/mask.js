// The inpainting mask: what is painted over the initial image. The canvas fires `change` when it has changed.

import { $, make } from "./dom.js";

let stroke = null; // where on the mask the brush is, while it paints
let isPainted = false;

export const hasPaint = () => isPainted;

/** A mask with nothing painted on it, of the shape of a picture of this size. */
export function blankMask({ width, height } = { width: 1, height: 1 }) {
  const scale = 512 / Math.max(width, height);
  Object.assign($("mask"), { width: Math.ceil(width * scale), height: Math.ceil(height * scale) });
  $("easel").style.maxWidth = `min(24rem, ${60 * width / height}vh)`;
  Object.assign($("mask").getContext("2d"), { strokeStyle: "#4457b8", lineCap: "round", lineJoin: "round" });
  isPainted = false;
}

function wipe() {
  $("mask").getContext("2d").clearRect(0, 0, $("mask").width, $("mask").height);
  isPainted = false;
  changed();
}

const changed = () => $("mask").dispatchEvent(new Event("change", { bubbles: true }));

function paint(event) {
  const brush = $("mask").getContext("2d"), box = $("mask").getBoundingClientRect(), scale = $("mask").width / box.width;
  const moves = event.getCoalescedEvents?.() ?? [];
  brush.lineWidth = $("brush").value * scale;
  brush.beginPath();
  for (const { clientX, clientY } of moves.length ? moves : [event]) {
    const point = [(clientX - box.left) * scale, (clientY - box.top) * scale];
    brush.moveTo(...(stroke ?? [point[0] - 0.1, point[1]])); // a line without length would not be drawn
    brush.lineTo(...point);
    stroke = point;
  }
  brush.stroke();
  isPainted = true;
}

/** A PNG file as a data: URL, white where it is painted. */
export function maskFile() {
  const { width, height } = $("mask"), canvas = make("canvas", { width, height }), ink = canvas.getContext("2d");
  ink.drawImage($("mask"), 0, 0);
  for (const [how, color] of [["source-in", "#fff"], ["destination-over", "#000"]]) {
    Object.assign(ink, { globalCompositeOperation: how, fillStyle: color });
    ink.fillRect(0, 0, width, height);
  }
  return canvas.toDataURL("image/png");
}

/** The pointer as large as the brush. */
function brushChanged() {
  const size = Number($("brush").value), at = size / 2;
  const ring = `<circle cx='${at}' cy='${at}' r='${at - 1}' fill='none' stroke='gray' stroke-width='2'/>`;
  const drawing = `<svg xmlns='http://www.w3.org/2000/svg' width='${size}' height='${size}'>${ring}</svg>`;
  $("mask").style.cursor = `url("data:image/svg+xml,${drawing}") ${at} ${at}, crosshair`;
}

$("brush").oninput = brushChanged;
$("clear").onclick = wipe;
$("mask").onpointerdown = (event) => {
  if (!event.isPrimary || event.button) return;
  event.target.setPointerCapture(event.pointerId);
  paint(event);
};
$("mask").onpointermove = (event) => { if (stroke && event.isPrimary) paint(event); };
$("mask").onlostpointercapture = () => { stroke = null; changed(); };

brushChanged();
