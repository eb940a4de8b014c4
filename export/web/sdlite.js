// sdlite in a browser: seeded noise, three samplers with guidance, ONNX networks on onnxruntime-web (wasm or WebGPU).
// The same seed gives the image that Python's sdlite.Pipeline gives. Names follow diffusers.

import * as ort from "./ort/ort.webgpu.bundle.min.mjs";
import * as editing from "./editing.js";
import { ClipTokenizer } from "./tokenizer.js";

export { ClipTokenizer, editing };

// --- noise: torch.randn on the CPU, as sdlite/sampling/noise.py --------------------------------------------------------------

class MersenneTwister {
  constructor(seed) {
    this.state = new Uint32Array(624);
    this.state[0] = seed;
    for (let i = 1; i < 624; i++) {
      const x = this.state[i - 1] ^ (this.state[i - 1] >>> 30);
      this.state[i] = Math.imul(1812433253, x) + i;
    }
    this.at = 624;
  }

  next() {
    if (this.at === 624) {
      for (let i = 0; i < 624; i++) {
        const y = (this.state[i] & 0x80000000) | (this.state[(i + 1) % 624] & 0x7fffffff);
        this.state[i] = this.state[(i + 397) % 624] ^ (y >>> 1) ^ (y & 1 ? 0x9908b0df : 0);
      }
      this.at = 0;
    }
    let y = this.state[this.at++];
    y ^= y >>> 11;
    y ^= (y << 7) & 0x9d2c5680;
    y ^= (y << 15) & 0xefc60000;
    return (y ^ (y >>> 18)) >>> 0;
  }
}

// Draws of one seed, one after another: n standard normal numbers, n a multiple of 16.
class Noise {
  constructor(seed) {
    this.bits = new MersenneTwister(Number(BigInt(seed) % 4294967296n));
  }

  normal(n) {
    if (n % 16) throw new Error(`${n} noise values; a multiple of 16 is needed`);
    const out = new Float32Array(n);
    for (let i = 0; i < n; i++) out[i] = (this.bits.next() & 0xffffff) * 2 ** -24;
    for (let i = 0; i < n; i += 16) {
      for (let k = i; k < i + 8; k++) {
        const radius = Math.sqrt(-2 * Math.log(Math.fround(1 - out[k])));
        const theta = Math.fround(2 * Math.PI) * out[k + 8];
        out[k] = radius * Math.cos(theta);
        out[k + 8] = radius * Math.sin(theta);
      }
    }
    return out;
  }
}

export function noise(seed, n) {
  return new Noise(seed).normal(n);
}

// --- samplers, as sdlite/sampling/solvers.py: {times, start, scaled(i, x), step(i, output, x, draw), ------------------
// noised(i, x0, noise): x at call i of clean latents, predicted(i, output, x): clean latents}

function rint(x) {  // halves to even, as numpy rounds
  const down = Math.floor(x);
  return x - down === 0.5 ? down + (down % 2) : Math.round(x);
}

// descending, not rounded for linspace
function spaced({ timestep_spacing: spacing, num_train_timesteps: total, steps_offset: offset }, n) {
  if (!(Number.isInteger(n) && n >= 1 && n <= total)) throw new Error(`${n} steps; accepted: 1 to ${total}`);
  return Array.from({ length: n }, (_, i) => {
    if (spacing === "trailing") return rint(total - (i * total) / n) - 1;
    if (spacing === "linspace") return n === 1 ? 0 : ((n - 1 - i) * (total - 1)) / (n - 1);
    return (n - 1 - i) * Math.floor(total / n) + offset;
  });
}

export function timesteps(schedule, n) {
  const times = spaced(schedule, n).map(rint), total = schedule.num_train_timesteps;
  if (times[0] >= total) throw new Error(`${n} steps; accepted: 1 to ${total - 1}`);
  return times;
}

// Float32Array of f(i), as long as x
const each = (x, f) => Float32Array.from(x, (_, i) => f(i));

// the network's output at alpha-bar a as [x_0, eps]
function split(kind, a, output, x) {
  const [alpha, sigma] = [Math.sqrt(a), Math.sqrt(1 - a)];
  if (kind === "epsilon") return [each(x, (i) => (x[i] - sigma * output[i]) / alpha), output];
  if (kind === "sample") return [output, each(x, (i) => (x[i] - alpha * output[i]) / sigma)];
  return [each(x, (i) => alpha * x[i] - sigma * output[i]), each(x, (i) => alpha * output[i] + sigma * x[i])];
}

const blend = (a, x0, eps) => each(x0, (i) => Math.sqrt(a) * x0[i] + Math.sqrt(1 - a) * eps[i]);

// of samplers whose x at time t has alpha-bar of t
function plain(schedule, times) {
  const bar = schedule.alphas_cumprod;
  return {
    times,
    noised: (i, x0, noise) => blend(bar[times[i]], x0, noise),
    predicted: (i, output, x) => split(schedule.prediction_type, bar[times[i]], output, x)[0],
  };
}

// Song et al. 2020, eq. 12, eta 0
function ddim(schedule, n) {
  const bar = schedule.alphas_cumprod, times = timesteps(schedule, n), stride = Math.floor(schedule.num_train_timesteps / n);
  return {
    ...plain(schedule, times),
    step(i, output, x) {
      const to = times[i] - stride;
      return blend(to >= 0 ? bar[to] : schedule.final_alpha, ...split(schedule.prediction_type, bar[times[i]], output, x));
    },
  };
}

// Luo et al. 2023, algorithm 3; share: of the schedule, the less noisy part, that the steps are spread over
function lcm(schedule, n, share = 1) {
  const bar = schedule.alphas_cumprod, origin = schedule.original_inference_steps, most = Math.trunc(origin * share);
  if (!(Number.isInteger(n) && n >= 1 && n <= most)) {
    throw new Error(`${n} steps; accepted: 1 to ${most}${share < 1 ? ` at strength ${share}` : ""}`);
  }
  const stride = Math.floor(schedule.num_train_timesteps / origin);
  const times = Array.from({ length: n }, (_, i) => (most - Math.floor(i * (most / n))) * stride - 1);
  return {
    ...plain(schedule, times),
    step(i, output, x, draw) {
      const [x0] = split(schedule.prediction_type, bar[times[i]], output, x), scaled = (times[i] * schedule.timestep_scaling) ** 2;
      const skip = 0.25 / (scaled + 0.25), out = Math.sqrt(scaled / (scaled + 0.25));
      const clean = each(x, (k) => out * x0[k] + skip * x[k]);
      return i === n - 1 ? clean : blend(bar[times[i + 1]], clean, draw());
    },
  };
}

// Karras et al. 2022, algorithm 1 without churn
function euler(schedule, n) {
  const table = schedule.alphas_cumprod.map((a) => Math.sqrt((1 - a) / a)), last = table.length - 1;
  if (schedule.rescale_betas_zero_snr) table[last] = 4096;
  const times = spaced(schedule, n).map(Math.fround);
  const sigmas = times.map((t) => {
    const low = Math.min(Math.floor(t), last), high = Math.min(low + 1, last);
    return table[low] + (Math.min(t, last) - low) * (table[high] - table[low]);
  });
  sigmas.push(0);
  const kind = schedule.prediction_type;
  const clean = (i, output, x) => {
    const s = sigmas[i], [a, b] = [s / Math.sqrt(s ** 2 + 1), 1 / (s ** 2 + 1)];
    return (k) => (kind === "epsilon" ? x[k] - s * output[k] : kind === "sample" ? output[k] : b * x[k] - a * output[k]);
  };
  return {
    times,
    noised: (i, x0, noise) => each(x0, (k) => x0[k] + sigmas[i] * noise[k]),
    predicted: (i, output, x) => each(x, clean(i, output, x)),
    start: schedule.timestep_spacing === "leading" ? Math.sqrt(sigmas[0] ** 2 + 1) : sigmas[0],
    scaled: (i, x) => x.map((v) => v / Math.sqrt(sigmas[i] ** 2 + 1)),
    step(i, output, x) {
      const s = sigmas[i], x0 = clean(i, output, x);
      return each(x, (k) => x[k] + ((x[k] - x0(k)) / s) * (sigmas[i + 1] - s));
    },
  };
}

const SAMPLERS = { ddim, lcm, euler };

export function sampler(name, schedule, n, share) {
  if (!(name in SAMPLERS)) {
    throw new Error(`this page samples with ${Object.keys(SAMPLERS).join(", ")}, not ${name}: export the model with --sampler ddim`);
  }
  return { start: 1, scaled: (i, x) => x, ...SAMPLERS[name](schedule, n, share) };
}

// The sampler of an edit and its first call, as Edit.schedule in sdlite/editing.py: the last steps are made, strength of
// them; or, of a model that spreads, all on the less noisy part.
export function part({ sampler: own, schedule, spreads }, n, strength) {
  if (spreads && strength > 0) return { solver: sampler(own.name, schedule, n, strength), first: 0 };
  const solver = sampler(own.name, schedule, n), made = Math.min(Math.trunc(n * strength), n);
  if (!made && strength > 0) {
    throw new Error(`strength ${strength} of ${n} steps is not one step; accepted: 0, or at least ${(1 / n).toPrecision(3)}; or more steps`);
  }
  return { solver, first: n - made };
}

// latents (C, h, w) by the model's map -> RGBA of h x w, as sdlite/preview.py paints them
export function preview(latents, colors, [, channels, height, width]) {
  const plane = height * width, pixels = new Uint8ClampedArray(4 * plane).fill(255);
  for (let i = 0; i < plane; i++) {
    for (let c = 0; c < 3; c++) {
      let v = colors[channels][c];
      for (let k = 0; k < channels; k++) v += latents[k * plane + i] * colors[k][c];
      pixels[4 * i + c] = ((v + 1) / 2) * 255;  // clamped, and rounded to even
    }
  }
  return { pixels, width, height };
}

// whether g asks for guidance: above 1, as in diffusers
export function guided(scale, negative = "") {
  if (!(Number.isFinite(scale) && scale >= 0)) throw new Error(`guidance ${scale}; accepted: 0 or more, and 0 to 1 is none`);
  if (negative && scale <= 1) throw new Error(`a negative prompt has no effect at guidance ${scale}; raise it above 1`);
  return scale > 1;
}

// u + g (c - u), as sdlite/sampling/loop.py
export const guide = (uncond, cond, scale) => each(cond, (k) => uncond[k] + scale * (cond[k] - uncond[k]));

// LCM: the guidance as an input of the UNet, as guidance_embedding in sdlite/families/sd.py
export function embedded(scale, width) {
  const half = Math.floor(width / 2), step = Math.fround(Math.fround(Math.log(10000)) / (half - 1)), out = new Float32Array(width);
  for (let i = 0; i < half; i++) {
    const angle = Math.fround(Math.fround(1000 * (scale - 1)) * Math.fround(Math.exp(Math.fround(i * -step))));
    out[i] = Math.sin(angle), out[half + i] = Math.cos(angle);
  }
  return out;
}

// latents -> what the decoder takes, as Pipeline.decode in sdlite/pipeline.py
export const unscaled = (latents, { scaling_factor: scaling, shift_factor: shift }) => each(latents, (k) => latents[k] / scaling + shift);

// --- files -------------------------------------------------------------------------------------------------------------

async function answered(url, signal) {
  const answer = await fetch(url, { signal });
  if (!answer.ok) throw new Error(`${url}: HTTP ${answer.status}; copy the whole exported folder to the server`);
  return answer;
}

// The bytes of a file, size of them; onBytes(n) for each piece of n bytes that arrives.
async function download(url, size, onBytes, signal) {
  const reader = (await answered(url, signal)).body.getReader(), out = new Uint8Array(size);
  let at = 0;
  for (let piece = await reader.read(); !piece.done; piece = await reader.read()) {
    if (at + piece.value.length > size) throw new Error(`${url} has more than ${size} bytes; copy the exported folder again`);
    out.set(piece.value, at);
    at += piece.value.length;
    onBytes(piece.value.length);
  }
  if (at < size) throw new Error(`${url} ended after ${at} of ${size} bytes; load the page again`);
  return out;
}

export const NO_ENCODER = "this export has no VAE encoder, so it edits no images: convert the model again (sdlite convert) and export that";

// --- pipeline ----------------------------------------------------------------------------------------------------------

export class Pipeline {
  // base: URL of the exported folder; provider: "wasm" or "webgpu"; signal: an AbortSignal;
  // onProgress(text, share) while files arrive, share from 0 to 1 of their bytes
  static async load(base = ".", { provider = "wasm", threads, signal, onProgress = () => {} } = {}) {
    ort.env.wasm.wasmPaths = { wasm: new URL(`${base}/ort/ort-wasm-simd-threaded.asyncify.wasm`, document.baseURI).href };
    ort.env.wasm.numThreads = threads ?? (self.crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency) : 1);
    if (provider === "webgpu" && !navigator.gpu) throw new Error("this browser has no WebGPU; choose wasm");
    const pipe = new Pipeline();
    pipe.settings = await (await answered(`${base}/sdlite-web.json`, signal)).json();
    sampler(pipe.settings.sampler.name, pipe.settings.schedule, 1);  // refuses before the networks are fetched
    pipe.tokenizer = await ClipTokenizer.load(`${base}/sdlite-tokenizer.json`);
    Object.assign(pipe, { base, provider, sessions: {} });
    await pipe.open(["text_encoder", "unet", "vae_decoder"], { signal, onProgress });
    return pipe;
  }

  // Fetch and open networks that are not open yet. The encoder, which edits alone need, is fetched at the first of them.
  async open(parts, { signal, onProgress = () => {} } = {}) {
    const { bytes: sizes, weights: beside } = this.settings, wanted = parts.filter((p) => !(p in this.sessions));
    const all = Object.keys(sizes).filter((name) => wanted.includes(name.split("/")[0])).reduce((sum, name) => sum + sizes[name], 0);
    let have = 0;
    for (const part of wanted) {
      const file = (name) => download(`${this.base}/${part}/${name}`, sizes[`${part}/${name}`], (n) => {
        have += n;
        onProgress(`loading ${part}, ${(have / 1e6).toFixed(1)} of ${(all / 1e6).toFixed(1)} MB`, have / all);
      }, signal);
      const options = { executionProviders: [this.provider] }, weights = beside[part];
      if (weights) {  // a large network: no second copy of its weights while it loads, wasm has 4 GB
        options.externalData = [{ path: weights, data: await file(weights) }];
        options.extra = { session: { disable_prepacking: "1" } };
      }
      this.sessions[part] = await ort.InferenceSession.create(await file("model.onnx"), options);
      signal?.throwIfAborted();
    }
  }

  // the networks' memory; the pipeline is of no use afterwards
  async release() {
    for (const session of Object.values(this.sessions)) await session.release();
  }

  // feeds: name -> {type, data, dims}; -> {data: Float32Array, dims}
  async run(part, feeds) {
    await this.open([part]);
    const tensors = Object.fromEntries(Object.entries(feeds).map(([k, v]) => [k, new ort.Tensor(v.type, v.data, v.dims)]));
    const session = this.sessions[part];
    const out = (await session.run(tensors))[session.outputNames[0]];
    return { data: out.data, dims: out.dims };
  }

  async encode(prompt) {
    const { ids, dropped } = this.tokenizer.encode(prompt);
    const out = await this.run("text_encoder", { input_ids: { type: "int64", data: ids, dims: [1, ids.length] } });
    const warnings = dropped ? [`the text encoder reads ${ids.length - 2} tokens; dropped: ${dropped}`] : [];
    return { ...out, warnings };
  }

  get edits() {  // whether there is an encoder
    return "vae_encoder/model.onnx" in this.settings.bytes;
  }

  // RGB image of the networks' size -> latents, drawn from its posterior where there is one, as Pipeline.encode_image
  async encodeImage(image, draws) {
    const { latent_shape: shape, scaling_factor: scaling, shift_factor: shift } = this.settings, size = shape.reduce((a, b) => a * b);
    const dims = [1, 3, image.height, image.width];
    const { data } = await this.run("vae_encoder", { sample: { type: "float32", data: editing.pixels(image), dims } });
    let z = data;
    if (data.length === 2 * size) {
      const drawn = draws.normal(size);
      z = each(drawn, (i) => data[i] + Math.exp(Math.min(Math.max(data[size + i], -30), 20) / 2) * drawn[i]);
    }
    return { z: each(z, (i) => (z[i] - shift) * scaling), posterior: data.length === 2 * size };
  }

  // Where the loop starts, as Edit.start in sdlite/editing.py: {x, after(call, x): done after each call}
  async start(edit, solver, first, draws, drawn) {
    const { latent_shape: shape } = this.settings, size = shape.reduce((a, b) => a * b), n = solver.times.length;
    const fresh = () => drawn().map((v) => v * solver.start);
    if (!edit || (!edit.mask && edit.strength === 1)) return { x: fresh(), after: (call, x) => x };
    const { z: x0, posterior } = await this.encodeImage(edit.image, draws), noise = drawn();
    let after = (call, x) => x;
    if (edit.mask) {
      if (posterior) draws.normal(size);  // diffusers encodes the masked image too
      const plane = shape[2] * shape[3], painted = editing.latentMask(edit.mask, shape[2], shape[3]);
      after = (call, x) => {
        const kept = call === n ? x0 : solver.noised(call, x0, noise);
        return each(x, (i) => (painted[i % plane] ? x[i] : kept[i]));
      };
    }
    if (edit.strength === 1) return { x: noise.map((v) => v * solver.start), after };
    return { x: first === n ? x0 : solver.noised(first, x0, noise), after };
  }

  // image: RGB {data, width, height, channels: 3} to edit, see editing.read; mask_image: the same with one channel, 128 and
  // more is painted anew; strength: 0 to 1, the share of the steps that is made, default 0.8, with a mask 1
  // signal: an AbortSignal, looked at before every call of the UNet
  // onStep(step from 1, of how many, preview: {pixels: RGBA, width, height} of what the image will be, or null)
  // -> {pixels: Uint8ClampedArray RGBA, width, height, seconds, calls, warnings: what of a prompt did not fit}
  async generate({
    prompt, negative_prompt = "", seed = 0, num_inference_steps, guidance_scale, latents, image, mask_image, strength,
    signal, onStep = () => true,
  }) {
    const begin = performance.now(), { latent_shape: shape, preview: colors } = this.settings;
    const own = this.settings.sampler, scale = guidance_scale ?? own.guidance_scale, asked = num_inference_steps ?? own.num_inference_steps;
    if (!image && (mask_image || strength !== undefined)) throw new Error("a mask or a strength is given without an image; give the image");
    if (image && !this.edits) throw new Error(NO_ENCODER);
    const edit = image ? editing.edit(image, mask_image ?? null, strength, ...this.settings.size) : null;
    const { solver, first } = edit ? part(this.settings, asked, edit.strength) : { solver: sampler(own.name, this.settings.schedule, asked), first: 0 };
    const n = solver.times.length;
    const wide = this.settings.guidance_embedding, within = wide ? embedded(scale, wide) : null;
    if (within && negative_prompt) throw new Error("this model takes its guidance as an input: a negative prompt has no effect; leave it empty");
    const uncond = guided(scale, negative_prompt) && !within ? await this.encode(negative_prompt) : null, cond = await this.encode(prompt);
    const size = shape.reduce((a, b) => a * b), draws = new Noise(seed);
    if (latents && latents.length !== size) throw new Error(`${latents.length} latents; ${size} are needed, shape ${shape}`);
    let { x, after } = await this.start(edit, solver, first, draws, () => (latents ? Float32Array.from(latents) : draws.normal(size)));
    const unet = (embeds, data, t) => this.run("unet", {
      sample: { type: "float32", data, dims: shape },
      timestep: { type: "float32", data: Float32Array.of(t), dims: [] },
      encoder_hidden_states: { type: "float32", data: embeds.data, dims: embeds.dims },
      ...(within && { timestep_cond: { type: "float32", data: within, dims: [1, wide] } }),
    });
    for (const [i, t] of Array.from(solver.times.entries()).slice(first)) {
      signal?.throwIfAborted();
      const given = solver.scaled(i, x);
      let out = (await unet(cond, given, t)).data;
      if (uncond) {
        signal?.throwIfAborted();
        out = guide((await unet(uncond, given, t)).data, out, scale);
      }
      const seen = colors ? preview(solver.predicted(i, out, x), colors, shape) : null;
      x = after(i + 1, solver.step(i, out, x, () => draws.normal(size)));
      if (onStep(i + 1 - first, n - first, seen) === false) throw new Error(`cancelled after step ${i + 1 - first} of ${n - first}`);
      await new Promise((done) => setTimeout(done));  // wasm never leaves the page's thread: clicks and paints get their turn
    }
    signal?.throwIfAborted();
    const z = unscaled(x, this.settings);
    const made = await this.run("vae_decoder", { latent_sample: { type: "float32", data: z, dims: shape } });
    const [height, width] = made.dims.slice(2), plane = width * height;
    const pixels = new Uint8ClampedArray(4 * plane).fill(255);
    for (let c = 0; c < 3; c++) for (let i = 0; i < plane; i++) pixels[4 * i + c] = (made.data[c * plane + i] / 2 + 0.5) * 255;
    if (edit) editing.paste(pixels, edit);
    const warnings = [...cond.warnings, ...(uncond?.warnings ?? [])];
    return { pixels, width, height, seconds: (performance.now() - begin) / 1000, calls: n - first, warnings };
  }
}
