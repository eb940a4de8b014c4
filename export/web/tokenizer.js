// CLIP's byte-pair tokenizer, as sdlite/tokenizer.py, whose ClipTokenizer.to_json wrote what it
// reads: sdlite-tokenizer.json. It needs no other file.

// What the tokenizers library means by \s and \w; JavaScript means others.
const SPACE = "\\p{White_Space}", WORD = "[\\p{Alphabetic}\\p{M}\\p{Nd}\\p{Pc}\\p{Join_Control}]";
const SPACES = new RegExp(`${SPACE}+`, "gu");
const LAST_SPACES = new RegExp(`${SPACE}*$`, "u"), FIRST_SPACES = new RegExp(`^${SPACE}*`, "u");
const LAST_WORD = new RegExp(`${WORD}$`, "u"), FIRST_WORD = new RegExp(`^${WORD}`, "u");
// The library splits words a second time, by this.
const CONTRACTIONS = "'s|'t|'re|'ve|'m|'ll|'d";
const PIECES = new RegExp(`${CONTRACTIONS}|\\p{L}+|\\p{N}|[^${SPACE}\\p{L}\\p{N}]+`, "gu");

function byteLetters() {
  const printable = [];
  for (const [from, to] of [[33, 126], [161, 172], [174, 255]]) {
    for (let b = from; b <= to; b++) printable.push(b);
  }
  const table = [];
  let next = 256;
  for (let b = 0; b < 256; b++) table[b] = String.fromCharCode(printable.includes(b) ? b : next++);
  return table;
}

function normalize(text) {
  const spaced = text.normalize("NFC").replace(SPACES, " ");
  return Array.from(spaced, (c) => c.toLowerCase()).join("");  // no letter looks at its neighbors
}

// Finds added tokens in a text: the leftmost, and of those the longest.
class Matcher {
  constructor(tokens) {
    this.tokens = new Map(tokens.map((t) => [t.text, t]));
    const longest = [...this.tokens.keys()].sort((a, b) => b.length - a.length);
    const patterns = longest.map((text) => text.replace(/[\\^$.*+?()[\]{}|]/g, "\\$&"));
    this.pattern = patterns.length ? new RegExp(patterns.join("|"), "gu") : null;
  }

  // -> [{text, id}], id undefined between the tokens
  split(text) {
    const out = [];
    let begin = 0;
    for (const match of this.pattern ? text.matchAll(this.pattern) : []) {
      const token = this.tokens.get(match[0]);
      let start = match.index, stop = start + match[0].length;
      const [before, after] = [text.slice(0, start), text.slice(stop)];
      if (token.single_word && (LAST_WORD.test(before) || FIRST_WORD.test(after))) continue;
      if (token.lstrip) start = Math.max(begin, before.search(LAST_SPACES));
      if (token.rstrip) stop += after.match(FIRST_SPACES)[0].length;
      if (begin < start) out.push({ text: text.slice(begin, start) });
      out.push({ text: match[0], id: token.id });
      begin = stop;
    }
    if (begin < text.length) out.push({ text: text.slice(begin) });
    return out;
  }
}

export class ClipTokenizer {
  // what: see ClipTokenizer.to_json in sdlite/tokenizer.py
  constructor(what) {
    Object.assign(this, what);
    this.rank = new Map(this.merges.map((pair, i) => [pair, i]));
    this.pattern = new RegExp(this.words.replaceAll("\\s", SPACE), "gu");
    this.letters = byteLetters();
    this.given = new Matcher(this.added.filter((t) => !t.normalized));
    this.normalized = new Matcher(this.added.filter((t) => t.normalized));
  }

  static async load(url) {
    const answer = await fetch(url);
    if (!answer.ok) throw new Error(`${url}: HTTP ${answer.status}; export the folder again`);
    return new ClipTokenizer(await answer.json());
  }

  word(text) {
    let parts = Array.from(new TextEncoder().encode(text), (b) => this.letters[b]);
    parts[parts.length - 1] += "</w>";
    while (parts.length > 1) {
      let best = Infinity, at = -1;
      for (let i = 0; i + 1 < parts.length; i++) {
        const rank = this.rank.get(`${parts[i]} ${parts[i + 1]}`) ?? Infinity;
        if (rank < best) [best, at] = [rank, i];
      }
      if (at < 0) break;
      parts.splice(at, 2, parts[at] + parts[at + 1]);
    }
    return parts.map((p) => this.vocab[p] ?? this.unk).filter((id) => id !== null);
  }

  pieces(text) {
    return (text.match(this.pattern) ?? []).flatMap((w) => w.match(PIECES));
  }

  tokens(prompt) {
    return this.given.split(prompt).flatMap(({ text, id }) => {
      if (id !== undefined) return [id];
      return this.normalized.split(normalize(text)).flatMap((part) =>
        part.id === undefined ? this.pieces(part.text).flatMap((w) => this.word(w)) : [part.id]);
    });
  }

  // ids -> text, about as it was written
  text(ids) {
    const names = new Map(Object.entries(this.vocab).map(([name, id]) => [id, name]));
    for (const token of this.added) names.set(token.id, `${token.text}</w>`);
    const bytes = new Map(this.letters.map((letter, b) => [letter, [b]]));
    const spaced = ids.map((id) => names.get(id).replace("</w>", " ")).join("");
    const encoder = new TextEncoder();
    const utf8 = Array.from(spaced).flatMap((c) => bytes.get(c) ?? [...encoder.encode(c)]);
    return new TextDecoder().decode(Uint8Array.from(utf8)).trim();
  }

  // prompt -> {ids: BigInt64Array of max_length, dropped: text that did not fit, "" if all did}
  encode(prompt) {
    if (typeof prompt !== "string" || /\p{Cs}/u.test(prompt)) {
      throw new Error(`a prompt is a string of whole characters, not ${JSON.stringify(prompt)}`);
    }
    let all = this.tokens(prompt);
    for (const found of new Set(all)) {  // tokens of several vectors are spelled out
      for (const [id, token, spelled] of this.vectors) {
        if (id === found) prompt = prompt.replaceAll(token, () => spelled);
      }
    }
    if (this.vectors.length) all = this.tokens(prompt);
    const kept = all.slice(0, this.max_length - 2);
    const ids = new BigInt64Array(this.max_length).fill(BigInt(this.pad));
    [this.bos, ...kept, this.eos].forEach((id, i) => (ids[i] = BigInt(id)));
    return { ids, dropped: kept.length < all.length ? this.text(all.slice(kept.length)) : "" };
  }
}
