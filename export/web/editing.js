// Images that an edit starts from, and masks: the rules of sdlite/image_input.py, number for number.

// --- scaling: Pillow's Lanczos, in its whole numbers, a pass along each side ------------------------------------------------

const BITS = 22;

function sinc(x) {
  return x === 0 ? 1 : Math.sin(x * Math.PI) / (x * Math.PI);
}

// for each of `to` pixels: where it starts among `from` pixels, and their weights
function weights(from, to) {
  const scale = from / to, wide = Math.max(scale, 1), support = 3 * wide;
  return Array.from({ length: to }, (_, i) => {
    const center = (i + 0.5) * scale;
    const first = Math.max(Math.trunc(center - support + 0.5), 0), last = Math.min(Math.trunc(center + support + 0.5), from);
    const w = Array.from({ length: last - first }, (_, k) => {
      const x = (k + first - center + 0.5) / wide;
      return x >= -3 && x < 3 ? sinc(x) * sinc(x / 3) : 0;
    });
    const sum = w.reduce((a, b) => a + b, 0);
    return { first, w: w.map((v) => Math.trunc((v / sum) * 2 ** BITS + (v < 0 ? -0.5 : 0.5))) };
  });
}

// one pass: lines x from pixels -> lines x to; pixel k of line j is at j * line + k * step, and has `channels` numbers
function pass(data, out, { from, to, lines, line, step, outLine, outStep, channels }) {
  for (const [i, { first, w }] of weights(from, to).entries()) {
    for (let j = 0; j < lines; j++) {
      for (let c = 0; c < channels; c++) {
        let sum = 2 ** (BITS - 1), at = j * line + first * step + c;
        for (let k = 0; k < w.length; k++, at += step) sum += data[at] * w[k];
        out[j * outLine + i * outStep + c] = Math.min(Math.max(Math.floor(sum / 2 ** BITS), 0), 255);
      }
    }
  }
}

// An image {data: bytes, width, height, channels} of another size.
export function scaled({ data, width, height, channels }, toWidth, toHeight) {
  if (toWidth !== width) {
    const out = new Uint8Array(toWidth * height * channels);
    const along = { line: width * channels, step: channels, outLine: toWidth * channels, outStep: channels };
    pass(data, out, { from: width, to: toWidth, lines: height, ...along, channels });
    [data, width] = [out, toWidth];
  }
  if (toHeight !== height) {
    const out = new Uint8Array(width * toHeight * channels);
    const along = { line: channels, step: width * channels, outLine: channels, outStep: width * channels };
    pass(data, out, { from: height, to: toHeight, lines: width, ...along, channels });
    [data, height] = [out, toHeight];
  }
  return { data, width, height, channels };
}

function even(x) {  // halves to even, as Python rounds
  const down = Math.floor(x);
  return x - down === 0.5 ? down + (down % 2) : Math.round(x);
}

// Scaled until it covers the size, its middle kept.
export function covering(image, height, width) {
  if (image.width === width && image.height === height) return image;
  const scale = Math.max(width / image.width, height / image.height);
  const [wide, high] = [Math.max(width, even(image.width * scale)), Math.max(height, even(image.height * scale))];
  const all = scaled(image, wide, high), left = Math.floor((wide - width) / 2), top = Math.floor((high - height) / 2);
  const out = new Uint8Array(width * height * image.channels), row = width * image.channels;
  for (let y = 0; y < height; y++) {
    const from = ((top + y) * wide + left) * image.channels;
    out.set(all.data.subarray(from, from + row), y * row);
  }
  return { data: out, width, height, channels: image.channels };
}

// RGBA over white -> RGB
export function rgb({ data, width, height }) {
  const out = new Uint8Array(width * height * 3);
  for (let i = 0; i < width * height; i++) {
    const a = data[4 * i + 3] / 255;
    for (let c = 0; c < 3; c++) out[3 * i + c] = Math.round(data[4 * i + c] * a + 255 * (1 - a));
  }
  return { data: out, width, height, channels: 3 };
}

// A file of an image -> RGB, turned as its EXIF says; its color profile is not applied.
export async function read(file) {
  const said = `${file.name || "the image"} cannot be read as an image; give a PNG, JPEG or WebP file`;
  let bitmap;
  try {
    bitmap = await createImageBitmap(file, { imageOrientation: "from-image", premultiplyAlpha: "none", colorSpaceConversion: "none" });
  } catch {
    throw new Error(said);
  }
  const { width, height } = bitmap;
  try {
    const canvas = new OffscreenCanvas(width, height), context = canvas.getContext("2d", { willReadFrequently: true });
    context.drawImage(bitmap, 0, 0);
    return rgb(context.getImageData(0, 0, width, height));
  } catch {
    throw new Error(`${file.name || "the image"} has ${width}x${height} pixels, more than this browser can hold; scale it down`);
  } finally {
    bitmap.close();
  }
}

// --- an edit, as sdlite/editing.py ------------------------------------------------------------------------------------------

export const STRENGTH = 0.8, REPAINTED = 1;  // of a call that does not say, without and with a mask

// image: {data, width, height, channels: 3}; mask: {data, width, height, channels: 1}, 128 and more is painted, or null: all
// -> both of the size asked for, and strength; the mask has 0 and 255
export function edit(image, mask, strength, height, width) {
  strength ??= mask ? REPAINTED : STRENGTH;
  if (!(strength >= 0 && strength <= 1)) throw new Error(`strength ${strength}; accepted: 0 to 1`);
  if (!mask) return { image: covering(image, height, width), mask: null, strength };
  if (mask.width !== image.width || mask.height !== image.height) {
    throw new Error(`the mask is ${mask.width}x${mask.height} pixels, the image ${image.width}x${image.height}; give one of its size`);
  }
  const whole = { ...mask, data: mask.data.map((v) => (v >= 128 ? 255 : 0)) };
  if (!whole.data.some((v) => v)) throw new Error("the mask is empty: nothing would be painted; paint what is to change");
  const fitted = covering(whole, height, width), data = fitted.data.map((v) => (v >= 128 ? 255 : 0));
  if (!data.some((v) => v)) throw new Error(`the mask is empty at ${width}x${height}: what it paints is too thin, or is cut off; paint more`);
  return { image: covering(image, height, width), mask: { ...fitted, data }, strength };
}

// RGB bytes (H, W, 3) -> float32 (3, H, W) in [-1, 1]
export function pixels({ data, width, height }) {
  const plane = width * height, out = new Float32Array(3 * plane);
  for (let c = 0; c < 3; c++) for (let i = 0; i < plane; i++) out[c * plane + i] = (data[3 * i + c] / 255) * 2 - 1;
  return out;
}

// 1 where latents (h, w) are painted: the mask's pixel at the corner of each
export function latentMask(mask, height, width) {
  const stride = mask.width / width;
  return Array.from({ length: height * width }, (_, i) => mask.data[Math.floor(i / width) * stride * mask.width + (i % width) * stride] >= 128);
}

// Kept pixels as they were: RGBA `made` is changed.
export function paste(made, { image, mask }) {
  if (!mask) return;
  for (let i = 0; i < mask.data.length; i++) {
    if (mask.data[i] < 128) for (let c = 0; c < 3; c++) made[4 * i + c] = image.data[3 * i + c];
  }
}

// --- a mask that is painted by hand -----------------------------------------------------------------------------------------

export class Mask {
  constructor(width, height) {
    Object.assign(this, { width, height, channels: 1, data: new Uint8Array(width * height) });
  }

  get empty() {
    return !this.data.some((v) => v);
  }

  get share() {  // painted, 0 to 1
    return this.data.reduce((n, v) => n + (v > 0), 0) / this.data.length;
  }

  fill(value) {
    this.data.fill(value);
  }

  invert() {
    for (let i = 0; i < this.data.length; i++) this.data[i] = 255 - this.data[i];
  }

  // what lies within `radius` pixels of the line between two points becomes `value`
  stroke([x0, y0], [x1, y1], radius, value = 255) {
    const reach = Math.ceil(radius), [dx, dy] = [x1 - x0, y1 - y0], length = dx * dx + dy * dy;
    const low = (a, b) => Math.max(Math.floor(Math.min(a, b)) - reach, 0);
    const high = (a, b, most) => Math.min(Math.ceil(Math.max(a, b)) + reach, most - 1);
    for (let y = low(y0, y1); y <= high(y0, y1, this.height); y++) {
      for (let x = low(x0, x1); x <= high(x0, x1, this.width); x++) {
        const [px, py] = [x + 0.5 - x0, y + 0.5 - y0];
        const t = length ? Math.min(Math.max((px * dx + py * dy) / length, 0), 1) : 0;
        if (Math.hypot(px - t * dx, py - t * dy) <= radius) this.data[y * this.width + x] = value;
      }
    }
  }
}
