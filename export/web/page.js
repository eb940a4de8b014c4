// The page: its form, the image that is edited and its mask, previews and the result.

import { NO_ENCODER, Pipeline, editing, part } from "./sdlite.js";

const at = (id) => document.getElementById(id);
const say = (text) => (at("status").textContent = text);
const settings = await (await fetch("sdlite-web.json")).json();
const pipes = {};
let running = null;  // AbortController of the image in the making
let result = null;  // the last image: {pixels, width, height, label}
let touched = false;  // whether the strength was set by hand: else it is Python's default

function show(share) {
  at("bar").hidden = share === null;
  at("bar").value = share ?? 0;
}

function fail(error) {
  at("error").textContent = `${error.message ?? error}`;
}

// the first field that cannot be used, in words; "" where all can
function wrong() {
  const input = Array.from(at("form").elements).find((e) => !e.checkValidity());
  if (!input) return "";
  input.focus();
  const name = input.closest("label").firstChild.textContent.trim();
  return `${name} ${input.validity.valueMissing ? "is empty" : `is ${input.value}`}: ${input.validationMessage}`;
}

// --- the image that is edited, and its mask

const [HEIGHT, WIDTH] = settings.size;
const mask = new editing.Mask(WIDTH, HEIGHT);
let source = null;  // RGB, of the networks' size
let cursor = [WIDTH / 2, HEIGHT / 2];  // of the keyboard's brush
let last = null;  // where a stroke was last
let keyed = false;  // whether the keyboard's brush is shown

function context(id, width, height) {
  const canvas = at(id);
  if (canvas.width !== width || canvas.height !== height) [canvas.width, canvas.height] = [width, height];
  canvas.hidden = false;
  return canvas.getContext("2d", { willReadFrequently: true });
}

// RGB -> RGBA
function opaque({ data, width, height }) {
  const out = new Uint8ClampedArray(4 * width * height).fill(255);
  for (let i = 0; i < width * height; i++) for (let c = 0; c < 3; c++) out[4 * i + c] = data[3 * i + c];
  return out;
}

function drawSource() {
  const pixels = opaque(source), tint = [230, 0, 120];
  for (let i = 0; i < mask.data.length; i++) {
    if (mask.data[i]) for (let c = 0; c < 3; c++) pixels[4 * i + c] = 0.45 * pixels[4 * i + c] + 0.55 * tint[c];
  }
  const view = context("source", WIDTH, HEIGHT);
  view.putImageData(new ImageData(pixels, WIDTH, HEIGHT), 0, 0);
  if (keyed) {
    for (const [color, wide] of [["white", 2], ["black", 1]]) {
      Object.assign(view, { strokeStyle: color, lineWidth: (wide * WIDTH) / 300 });
      view.beginPath();
      view.arc(...cursor, Number(at("brush").value), 0, 2 * Math.PI);
      view.stroke();
    }
  }
  if (!touched) at("strength").value = mask.empty ? editing.STRENGTH : editing.REPAINTED;
  at("wide").textContent = `${Math.round(2 * Number(at("brush").value))} of ${WIDTH} px`;
  const painted = mask.empty ? "nothing painted: the whole image changes" : `${Math.max(1, Math.round(100 * mask.share))}% painted`;
  at("source").setAttribute("aria-label", `image to edit, and mask, ${painted}`);
  drawStrength();
}

// how many steps a strength is, or why it is none
function drawStrength() {
  const strength = Number(at("strength").value), n = Number(at("steps").value);
  let words;
  try {
    const { solver, first } = part(settings, n, strength);
    const made = solver.times.length - first;
    words = made ? `${made} of ${n} step${n === 1 ? "" : "s"}` : "the image as it is, through the autoencoder";
  } catch (error) {
    words = error.message.split(";")[0];
  }
  at("share").textContent = `${strength.toFixed(2)}: ${words}`;
  at("strength").setAttribute("aria-valuetext", at("share").textContent);
}

function setSource(image) {
  source = image && editing.covering(image, HEIGHT, WIDTH);
  mask.fill(0);
  [at("editor").hidden, at("remove").hidden] = [!source, !source];
  at("hint").textContent = source ? "Drop another image here, or" : "Drop an image here, or";
  if (source) drawSource();
}

async function take(file) {
  at("error").textContent = "";
  try {
    setSource(await editing.read(file));
    say(`${file.name} is the image to edit`);
  } catch (error) {
    fail(error);
  }
}

for (const id of ["file", "photo"]) {
  at(id).addEventListener("change", () => {
    if (at(id).files[0]) take(at(id).files[0]);
    at(id).value = "";  // so that the same file can be chosen again
  });
}
const over = (event, is) => {
  event.preventDefault();
  at("drop").classList.toggle("over", is);
};
for (const target of [at("drop"), at("editor")]) {
  target.addEventListener("dragover", (event) => over(event, true));
  target.addEventListener("dragleave", (event) => over(event, false));
  target.addEventListener("drop", (event) => {
    over(event, false);
    const file = event.dataTransfer.files[0];
    if (file) take(file);
    else fail(new Error("what was dropped is no file; save the image first, and drop that"));
  });
}
at("again").addEventListener("click", () => { setSource(editing.rgb({ data: result.pixels, ...result })); say("the result is the image to edit"); });
at("remove").addEventListener("click", () => { setSource(null); at("file").focus(); say("no image to edit"); });

// --- the brush

function brush(from, to) {
  const erasing = at("erase").getAttribute("aria-pressed") === "true";
  mask.stroke(from, to, Number(at("brush").value), erasing ? 0 : 255);
  drawSource();
}

function point(event) {
  const box = at("source").getBoundingClientRect();
  return [((event.clientX - box.x) / box.width) * WIDTH, ((event.clientY - box.y) / box.height) * HEIGHT];
}

at("source").addEventListener("pointerdown", (event) => {
  if (event.button !== 0) return;
  at("source").setPointerCapture(event.pointerId);
  keyed = false;
  last = point(event);
  brush(last, last);
});
at("source").addEventListener("pointermove", (event) => {
  if (!last) return;
  for (const each of event.getCoalescedEvents?.().concat(event) ?? [event]) {
    const next = point(each);
    brush(last, next);
    last = next;
  }
});
for (const kind of ["pointerup", "pointercancel"]) at("source").addEventListener(kind, () => (last = null));

const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
at("source").addEventListener("keydown", (event) => {
  const step = Math.max(1, Number(at("brush").value) / 2), move = ARROWS[event.key];
  const value = { " ": 255, Delete: 0, Backspace: 0 }[event.key];
  if (!move && value === undefined) return;
  event.preventDefault();
  keyed = true;
  if (move) cursor = cursor.map((v, i) => Math.min(Math.max(v + step * move[i], 0), [WIDTH, HEIGHT][i]));
  else mask.stroke(cursor, cursor, Number(at("brush").value), value);
  drawSource();
});
at("source").addEventListener("blur", () => { keyed = false; if (source) drawSource(); });

const changed = (how, words) => () => { how(); drawSource(); say(words); };
at("all").addEventListener("click", changed(() => mask.fill(255), "the whole image is painted"));
at("invert").addEventListener("click", changed(() => mask.invert(), "the mask is inverted"));
at("clear").addEventListener("click", changed(() => mask.fill(0), "the mask is cleared"));
at("erase").addEventListener("click", () => at("erase").setAttribute("aria-pressed", at("erase").getAttribute("aria-pressed") !== "true"));
at("brush").addEventListener("input", drawSource);
at("strength").addEventListener("input", () => (touched = true));
for (const id of ["strength", "steps"]) at(id).addEventListener("input", drawStrength);

// --- making an image

async function pipeline(provider, signal, parts) {
  const onProgress = (text, share) => { say(text); show(share); };
  pipes[provider] ??= await Pipeline.load(".", { provider, signal, onProgress });
  if (parts.length) await pipes[provider].open(parts, { signal, onProgress });
  return pipes[provider];
}

// The result is brought into view where it stands below the form: as little as will do, and at once, so that no button
// moves away under a finger.
const reveal = () => at("image").scrollIntoView({ block: "nearest", behavior: "instant" });

function draw({ pixels, width, height, label }) {
  context("image", width, height).putImageData(new ImageData(pixels, width, height), 0, 0);
  at("image").setAttribute("aria-label", label);
}

async function paint(made, prompt, seed) {
  const label = `generated image: ${prompt}`;
  draw({ ...made, label });
  const blob = await new Promise((done) => at("image").toBlob(done));
  URL.revokeObjectURL(at("save").href);
  Object.assign(at("save"), { href: URL.createObjectURL(blob), download: `sdlite-${seed}.png`, hidden: false });
  result = { pixels: made.pixels, width: made.width, height: made.height, label };
  at("again").hidden = false;
  reveal();
}

async function generate(signal) {
  const provider = at("provider").value, seed = at("seed").value, prompt = at("prompt").value;
  const edit = source ? { image: source, strength: Number(at("strength").value), mask_image: mask.empty ? undefined : mask } : {};
  const pipe = await pipeline(provider, signal, source ? ["vae_encoder"] : []);
  at("save").hidden = true;
  const made = await pipe.generate({
    prompt, seed, signal, ...edit,
    num_inference_steps: Number(at("steps").value), guidance_scale: Number(at("guidance").value),
    onStep: (step, steps, preview) => {
      show(step / steps);
      say(`step ${step} of ${steps}`);
      if (preview && step === 1) setTimeout(reveal);
      if (preview) draw({ ...preview, label: `preview after step ${step} of ${steps}` });
    },
  });
  await paint(made, prompt, seed);
  at("warning").textContent = made.warnings.join("; ");
  say(`${made.seconds.toFixed(2)} s on ${provider}`);
}

// one button stands in the other's place, and has the focus that the other had
function swap(from, to) {
  const focused = document.activeElement === at(from);
  [at(from).hidden, at(to).hidden] = [true, false];
  if (focused) at(to).focus();
}

at("form").addEventListener("submit", async (event) => {
  event.preventDefault();
  at("warning").textContent = "";
  if ((at("error").textContent = wrong())) return;
  running = new AbortController();
  swap("go", "cancel");
  try {
    await generate(running.signal);
  } catch (error) {
    say("");
    if (result) [at("save").hidden] = [false, draw(result)];  // not a preview of what was not made
    else at("image").hidden = true;
    if (running.signal.aborted) say("cancelled");
    else fail(error);
  } finally {
    swap("cancel", "go");
    show(null);
  }
});
at("cancel").addEventListener("click", () => { running.abort(); say("cancelling"); });
at("random").addEventListener("click", () => (at("seed").value = crypto.getRandomValues(new Uint32Array(1))[0]));

// --- what the page begins with

at("steps").value = settings.sampler.num_inference_steps;
at("guidance").value = settings.sampler.guidance_scale;
Object.assign(at("brush"), { max: Math.max(WIDTH, HEIGHT) / 3, value: Math.max(WIDTH, HEIGHT) / 10 });
const coarse = matchMedia("(pointer: coarse)").matches;  // a phone: nothing is dropped there, and it has a camera
[at("camera").hidden, at("hint").hidden] = [!coarse, coarse];
const edits = "vae_encoder/model.onnx" in settings.bytes;
[at("edit").hidden, at("noedit").hidden] = [!edits, edits];
if (!edits) at("noedit").textContent = `No editing: ${NO_ENCODER}.`;
window.sdlite = { Pipeline, pipes };
document.body.dataset.ready = "yes";
