// The initial image, its strength, and whether only a part of it is regenerated.

import { $, BLANK } from "./dom.js";
import { blankMask, hasPaint, maskFile } from "./mask.js";
import { served } from "./model.js";
import { readPicture } from "./picture-file.js";
import { clearProblem, complain } from "./problem.js";
import { sizeChanged } from "./sizes.js";

const field = $("form").elements;

let start = null; // the picture, if any: { name, url, width, height, file }
let taken = null; // the file that was last chosen for it
let strengthChosen = false; // by hand, and not by what is usual

export const initialName = () => start?.name;
const hasMask = () => Boolean(start) && $("part").checked && hasPaint();

/** What gives it again: { file, isMasked }, or nothing. */
export const initialOf = () => start ? { file: start.file, isMasked: hasMask() } : null;

/** What it adds to a request. */
export function imageFields() {
  if (!start) return {};
  const file = (url) => url.split(",")[1];
  return {
    image: file(start.url), strength: Number($("strength").value),
    mask: hasMask() ? file(maskFile()) : undefined,
  };
}

/** Start from the picture in this file. Says whether that was possible. */
export async function take(file) {
  $("start").open = true;
  taken = file;
  const picture = await readPicture(file).catch((error) => { if (taken === file) complain(error); });
  if (!picture || taken !== file) return false; // another one was chosen meanwhile
  clearProblem();
  startFrom({ ...picture, file });
  return true;
}

export function setStrength(value) {
  $("strength").value = value;
  strengthChosen = true;
  imageChanged();
}

/** Take it, and go where it is. */
export async function useAsStart(file) {
  await take(file);
  $("start").firstElementChild.focus({ preventScroll: true });
  $("start").scrollIntoView({ block: "nearest" });
}

/** Start from this picture, or from none. */
export function startFrom(picture) {
  start = picture;
  $("origin").textContent = start ? `: ${start.name}` : "";
  $("choose").textContent = start ? "Another file" : "Choose a file";
  $("original").hidden = !start;
  $("thumbnail").src = $("painted").src = start?.url ?? BLANK;
  if (!start) strengthChosen = $("part").checked = false;
  else if (served.model) field.size.value = served.model.resolutions.reduce(nearer, field.size.value);
  blankMask(start ?? undefined);
  imageChanged();
}

/** How far a size is from the shape of the picture to start from: 0 is the same shape. */
function misfit(size) {
  const [width, height] = size.split("x");
  return Math.abs(Math.log(width / height * start.height / start.width));
}

const nearer = (one, other) => misfit(other) < misfit(one) ? other : one;

/** Say what becomes of the picture, and what strength is usual. */
export function imageChanged() {
  const size = field.size.value.replace("x", " × ");
  const fate = start && size && misfit(field.size.value) > 0.02 ? `, stretched to ${size}` : "";
  if (start) $("size").textContent = `${start.width} × ${start.height} pixels${fate}.`;
  $("painting").hidden = !start || !$("part").checked;
  if (!strengthChosen) $("strength").value = hasMask() ? 1 : 0.8; // as the server would
  $("strength-shown").value = $("strength").value;
  sizeChanged();
}

$("remove").onclick = () => { startFrom(null); $("file").focus(); };
$("strength").oninput = () => { strengthChosen = true; imageChanged(); };
