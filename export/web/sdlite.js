// sdlite in a browser: seeded noise, DDIM with guidance, and three ONNX networks on onnxruntime-web (wasm or WebGPU).
// The same seed gives the picture that Python's sdlite.Pipeline gives. Names follow diffusers.

import * as ort from "./ort/ort.webgpu.bundle.min.mjs";
import { ClipTokenizer } from "./tokenizer.js";

export { ClipTokenizer };

// --- noise: torch.randn on the CPU, as sdlite/sampling.py --------------------------------------------------------------

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

// n standard normal numbers, n a multiple of 16
export function noise(seed, n) {
  if (n % 16) throw new Error(`${n} noise values; a multiple of 16 is needed`);
  const bits = new MersenneTwister(Number(BigInt(seed) % 4294967296n));
  const out = new Float32Array(n);
  for (let i = 0; i < n; i++) out[i] = (bits.next() & 0xffffff) * 2 ** -24;
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

// --- DDIM, eta 0: Song et al. 2020, eq. 12 -----------------------------------------------------------------------------

function rint(x) {  // halves to even, as numpy rounds
  const down = Math.floor(x);
  return x - down === 0.5 ? down + (down % 2) : Math.round(x);
}

export function timesteps({ timestep_spacing: spacing, num_train_timesteps: total, steps_offset: offset }, n) {
  if (!(Number.isInteger(n) && n >= 1 && n <= total)) throw new Error(`${n} steps; accepted: 1 to ${total}`);
  return Array.from({ length: n }, (_, i) => {
    if (spacing === "trailing") return rint(total - (i * total) / n) - 1;
    if (spacing === "linspace") return n === 1 ? 0 : rint(((n - 1 - i) * (total - 1)) / (n - 1));
    return (n - 1 - i) * Math.floor(total / n) + offset;
  });
}

function step(schedule, t, n, output, x) {
  const bar = schedule.alphas_cumprod, before = t - Math.floor(schedule.num_train_timesteps / n);
  const [alpha, sigma] = [Math.sqrt(bar[t]), Math.sqrt(1 - bar[t])];
  const to = before >= 0 ? bar[before] : schedule.final_alpha;
  const next = new Float32Array(x.length);
  for (let i = 0; i < x.length; i++) {
    let x0, eps;
    if (schedule.prediction_type === "epsilon") [x0, eps] = [(x[i] - sigma * output[i]) / alpha, output[i]];
    else if (schedule.prediction_type === "sample") [x0, eps] = [output[i], (x[i] - alpha * output[i]) / sigma];
    else [x0, eps] = [alpha * x[i] - sigma * output[i], alpha * output[i] + sigma * x[i]];
    if (schedule.clip_sample) x0 = Math.min(Math.max(x0, -schedule.clip_sample_range), schedule.clip_sample_range);
    next[i] = Math.sqrt(to) * x0 + Math.sqrt(1 - to) * eps;
  }
  return next;
}

// --- pipeline ----------------------------------------------------------------------------------------------------------

export class Pipeline {
  // base: URL of the exported folder; provider: "wasm" or "webgpu"; onProgress(text) while files arrive
  static async load(base = ".", { provider = "wasm", threads, onProgress = () => {} } = {}) {
    ort.env.wasm.wasmPaths = { wasm: new URL(`${base}/ort/ort-wasm-simd-threaded.asyncify.wasm`, document.baseURI).href };
    ort.env.wasm.numThreads = threads ?? (self.crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency) : 1);
    if (provider === "webgpu" && !navigator.gpu) throw new Error("this browser has no WebGPU; choose wasm");
    const pipe = new Pipeline();
    pipe.settings = await (await fetch(`${base}/sdlite-web.json`)).json();
    pipe.tokenizer = await ClipTokenizer.load(`${base}/sdlite-tokenizer.json`);
    pipe.sessions = {};
    for (const part of ["text_encoder", "unet", "vae_decoder"]) {
      onProgress(`loading ${part}`);
      const options = { executionProviders: [provider] }, weights = pipe.settings.weights[part];
      if (weights) {  // a large network: no second copy of its weights while it loads, wasm has 4 GB
        options.externalData = [{ path: weights, data: `${base}/${part}/${weights}` }];
        options.extra = { session: { disable_prepacking: "1" } };
      }
      pipe.sessions[part] = await ort.InferenceSession.create(`${base}/${part}/model.onnx`, options);
    }
    return pipe;
  }

  // the networks' memory; the pipeline is of no use afterwards
  async release() {
    for (const session of Object.values(this.sessions)) await session.release();
  }

  // feeds: name -> {type, data, dims}; -> {data: Float32Array, dims}
  async run(part, feeds) {
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

  // -> {pixels: Uint8ClampedArray RGBA, width, height, seconds, warnings: what of a prompt did not fit}
  async generate({ prompt, negative_prompt = "", seed = 0, num_inference_steps, guidance_scale, latents, onStep = () => true }) {
    const begin = performance.now(), { schedule, latent_shape: shape, scaling_factor: scaling, shift_factor: shift, sampler } = this.settings;
    const n = num_inference_steps ?? sampler.num_inference_steps, scale = guidance_scale ?? sampler.guidance_scale;
    const cond = await this.encode(prompt), uncond = scale === 1 ? null : await this.encode(negative_prompt);
    const size = shape.reduce((a, b) => a * b);
    let x = latents ? Float32Array.from(latents) : noise(seed, size);
    if (x.length !== size) throw new Error(`${x.length} latents; ${size} are needed, shape ${shape}`);
    const unet = (embeds, t) => this.run("unet", {
      sample: { type: "float32", data: x, dims: shape },
      timestep: { type: "float32", data: Float32Array.of(t), dims: [] },
      encoder_hidden_states: { type: "float32", data: embeds.data, dims: embeds.dims },
    });
    const times = timesteps(schedule, n);
    for (const [i, t] of times.entries()) {
      let out = (await unet(cond, t)).data;
      if (uncond) {
        const u = (await unet(uncond, t)).data;
        out = out.map((c, k) => u[k] + scale * (c - u[k]));
      }
      x = step(schedule, t, n, out, x);
      if (onStep(i + 1, n) === false) throw new Error(`cancelled after step ${i + 1} of ${n}`);
    }
    const z = x.map((v) => v / scaling + shift);
    const image = await this.run("vae_decoder", { latent_sample: { type: "float32", data: z, dims: shape } });
    const [height, width] = image.dims.slice(2), plane = width * height;
    const pixels = new Uint8ClampedArray(4 * plane).fill(255);
    for (let c = 0; c < 3; c++) for (let i = 0; i < plane; i++) pixels[4 * i + c] = (image.data[c * plane + i] / 2 + 0.5) * 255;
    const warnings = [...cond.warnings, ...(uncond?.warnings ?? [])];
    return { pixels, width, height, seconds: (performance.now() - begin) / 1000, warnings };
  }
}
