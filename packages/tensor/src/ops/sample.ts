/**
 * Choosing the next token on the device: the steps of transformers' logits processors, in their order, on the logits of
 * each row, and a draw or the most likely token. One workgroup a row, sums in a fixed order, no waiting for the host.
 */
import { ShapeError } from '../errors.js';
import { defineKernel } from '../kernel.js';
import type { Tensor } from '../tensor.js';

const threads = 256;

/** Values of `ids` below 0: what was wrong with the logits. NaN at token i is `sampleNaN - i`. */
export const sampleInfinite = -1;
/** No token is left: every logit is -Infinity. */
export const sampleNothing = -2;
/** See `sampleInfinite`. */
export const sampleNaN = -3;

// Scores become unsigned keys that order as they do; key 0 is a token that may not be chosen.
const kernel = defineKernel({
  name: 'sample',
  bindings: {
    logits: { access: 'read', width: 1 },
    points: { access: 'read', width: 1 },
    barred: 'read',
    seen: 'update',
    keys: 'update',
    ids: 'write',
  },
  params: {
    vocab: 'u32',
    pitch: 'u32',
    words: 'u32',
    barred_count: 'u32',
    penalty: 'f32',
    temperature: 'f32',
    top_k: 'u32',
    tail: 'f32',
    min_p: 'f32',
    /** 32. Not a constant, as software devices would unroll the loop and take long to compile it. */
    bits: 'u32',
  },
  constants: { DRAW: 0, PENALTY: 0, TOP_K: 0, TOP_P: 0 },
  workgroupSize: threads,
  body: `
const NONE: u32 = 0xffffffffu;
var<workgroup> best: atomic<u32>;
var<workgroup> best_id: atomic<u32>;
var<workgroup> nan_at: atomic<u32>;
var<workgroup> histogram: array<atomic<u32>, 256>;
var<workgroup> found: array<u32, 2>;
var<workgroup> parts: array<f32, WORKGROUP>;
var<workgroup> sixteenths: array<f32, 16>;
fn key_of(score: f32) -> u32 {
  let bits = bitcast<u32>(select(score, 0.0, score == 0.0));
  return select(bits | 0x80000000u, ~bits, bits >= 0x80000000u);
}
fn score_of(key: u32) -> f32 { return bitcast<f32>(select(~key, key & 0x7fffffffu, key >= 0x80000000u)); }
// The sum over the workgroup: 16 threads add 16 parts each, then everybody their sums.
fn sum_of(lane: u32, v: f32) -> f32 {
  workgroupBarrier();
  parts[lane] = v;
  workgroupBarrier();
  if (lane < 16u) {
    var s = 0.0;
    for (var i = 0u; i < 16u; i++) { s += parts[16u * lane + i]; }
    sixteenths[lane] = s;
  }
  workgroupBarrier();
  var s = 0.0;
  for (var i = 0u; i < 16u; i++) { s += sixteenths[i]; }
  return s;
}
fn kernel(group: u32, lane: u32) {
  let base = group * P.vocab;
  if (lane == 0u) { atomicStore(&best, 0u); atomicStore(&best_id, NONE); atomicStore(&nan_at, NONE); }
  workgroupBarrier();
  var own = 0u;
  var own_id = NONE;
  for (var i = lane; i < P.vocab; i += WORKGROUP) {
    var score = logits_load(group * P.pitch + i);
    let bits = bitcast<u32>(score);
    if ((bits & 0x7fffffffu) > 0x7f800000u) { atomicMin(&nan_at, i); }
    if (PENALTY == 1u) {
      if (((seen_load(group * P.words + i / 32u) >> (i % 32u)) & 1u) == 1u) {
        score = select(score / P.penalty, score * P.penalty, score < 0.0);
      }
    }
    if (DRAW == 1u) { score /= P.temperature; }
    var key = select(key_of(score), 0u, bits == 0xff800000u);
    for (var j = 0u; j < P.barred_count; j++) { if (i == u32(barred_load(j))) { key = 0u; } }
    if (DRAW == 1u) { keys_store(base + i, key); }
    if (key > own) { own = key; own_id = i; }
  }
  atomicMax(&best, own);
  workgroupBarrier();
  let top = atomicLoad(&best);
  if (own == top) { atomicMin(&best_id, own_id); }
  storageBarrier();
  workgroupBarrier();
  var chosen = atomicLoad(&best_id);
  if (DRAW == 1u) {
    var least = 1u;
    if (TOP_K == 1u) {
      // The k-th largest key, eight bits at a time.
      if (lane == 0u) { found[0] = 0u; found[1] = P.top_k; }
      for (var digit = 0u; digit < P.bits / 8u; digit++) {
        let shift = 24u - 8u * digit;
        atomicStore(&histogram[lane], 0u);
        workgroupBarrier();
        let prefix = found[0];
        for (var i = lane; i < P.vocab; i += WORKGROUP) {
          let key = keys_load(base + i);
          if (digit == 0u || (key >> (shift + 8u)) == prefix) { atomicAdd(&histogram[(key >> shift) & 255u], 1u); }
        }
        workgroupBarrier();
        if (lane == 0u) {
          var wanted = found[1];
          var bin = 255u;
          for (; bin > 0u; bin--) {
            let count = atomicLoad(&histogram[bin]);
            if (count >= wanted) { break; }
            wanted -= count;
          }
          found[0] = (prefix << 8u) | bin;
          found[1] = wanted;
        }
        workgroupBarrier();
      }
      least = max(least, found[0]);
    }
    let high = score_of(top);
    // Of the tokens with the least key that stays, those from this id on go.
    var bound = P.vocab;
    if (TOP_P == 1u) {
      var mass = 0.0;
      for (var i = lane; i < P.vocab; i += WORKGROUP) {
        let key = keys_load(base + i);
        if (key >= least) { mass += exp(score_of(key) - high); }
      }
      let allowed = P.tail * sum_of(lane, mass);
      // The largest key so that all below it together have at most the tail's weight, bit by bit from the top.
      var cut = 0u;
      var below = 0.0;
      for (var bit = 0u; bit < P.bits; bit++) {
        let next = cut | (0x80000000u >> bit);
        mass = 0.0;
        for (var i = lane; i < P.vocab; i += WORKGROUP) {
          let key = keys_load(base + i);
          if (key >= least && key < next) { mass += exp(score_of(key) - high); }
        }
        let sum = sum_of(lane, mass);
        if (next <= top && sum <= allowed) { cut = next; below = sum; }
      }
      if (cut > least) { least = cut; }
      // Equals go from the highest id on, one always stays.
      var equal = 0.0;
      for (var i = lane; i < P.vocab; i += WORKGROUP) { equal += select(0.0, 1.0, keys_load(base + i) == least); }
      let equals = sum_of(lane, equal);
      let each = max(exp(score_of(least) - high), 1e-37);
      var drop = u32(clamp((allowed - below) / each, 0.0, max(equals - 1.0, 0.0)));
      if (lane == 0u) {
        while (drop > 0u) { bound--; if (keys_load(base + bound) == least) { drop--; } }
        found[0] = bound;
      }
      workgroupBarrier();
      bound = found[0];
    }
    // Everybody sums a stretch of ids; then one finds the stretch and the token where the running sum passes the point.
    let stretch = (P.vocab + WORKGROUP - 1u) / WORKGROUP;
    var mass = 0.0;
    for (var i = lane * stretch; i < min((lane + 1u) * stretch, P.vocab); i++) {
      let key = keys_load(base + i);
      if (key > least || (key == least && i < bound)) {
        let weight = exp(score_of(key) - high);
        if (weight >= P.min_p) { mass += weight; }
      }
    }
    let total = sum_of(lane, mass);
    if (lane == 0u) {
      var rest = points_load(group) * total;
      var at = 0u;
      var last = 0u;
      for (; at < WORKGROUP; at++) {
        if (parts[at] > 0.0) { last = at; }
        if (rest < parts[at]) { break; }
        rest -= parts[at];
      }
      // The sum may fall short by rounding: then it is the last token that may be chosen.
      if (at == WORKGROUP) { at = last; rest = total; }
      for (var i = at * stretch; i < min((at + 1u) * stretch, P.vocab); i++) {
        let key = keys_load(base + i);
        if (!(key > least || (key == least && i < bound))) { continue; }
        let weight = exp(score_of(key) - high);
        if (weight < P.min_p || weight == 0.0) { continue; }
        chosen = i;
        if (rest < weight) { break; }
        rest -= weight;
      }
    }
  }
  if (lane != 0u) { return; }
  let nan = atomicLoad(&nan_at);
  if (nan != NONE) { ids_store(group, ${sampleNaN} - i32(nan)); return; }
  if (top == 0u) { ids_store(group, ${sampleNothing}); return; }
  if (top >= 0xff800000u) { ids_store(group, ${sampleInfinite}); return; }
  ids_store(group, i32(chosen));
  if (PENALTY == 1u) {
    let word = group * P.words + chosen / 32u;
    seen_store(word, seen_load(word) | (1u << (chosen % 32u)));
  }
}`,
});

/** How `sample` chooses. */
export interface SampleOptions {
  /** Draws when true; takes the most likely otherwise, the lowest id among equals, and the settings below do nothing. */
  readonly draw: boolean;
  /** Divides the logits. */
  readonly temperature: number;
  /** Only tokens that reach the k-th largest logit; 0 for all. */
  readonly topK: number;
  /** Drops the least likely tokens that together have at most 1 - p. */
  readonly topP: number;
  /** Only tokens at least this share as likely as the most likely. */
  readonly minP: number;
  /** Of tokens that were seen: a score below 0 times the penalty, any other divided by it; 1 for none. For greedy choice too. */
  readonly penalty: number;
  /** How many of the barred tokens must not be chosen: the first ones. */
  readonly barred: number;
}

/** What `sample` reads and writes. */
export interface SampleState {
  /** i32 [..] of B elements: the chosen ids; below 0 where that was impossible (see `sampleInfinite`). */
  readonly ids: Tensor;
  /** f32 [B]: a number in [0, 1) for each row's draw. */
  readonly points: Tensor;
  /** u32 [B, ceil(V / 32)]: one bit a token, set when it was seen; the chosen one's is set where there is a penalty. */
  readonly seen: Tensor;
  /** i32 [at least 1]: tokens that may be barred. */
  readonly barred: Tensor;
  /** u32 [B, V] to work in; any u32 tensor where nothing is drawn. */
  readonly keys: Tensor;
}

/**
 * Chooses a token of each row of logits, f32 [B, V], after transformers' processors in their order: repetition penalty,
 * barred tokens, temperature, top-k, top-p, min-p. Probabilities are f32. The choice goes into `state`.
 *
 * @throws ShapeError when the state was made for fewer rows or a smaller vocabulary
 */
export function sample(logits: Tensor, state: SampleState, options: SampleOptions): void {
  const { draw, temperature, topK, topP, minP, penalty, barred } = options;
  const [B, V] = logits.shape;
  const words = Math.ceil(V / 32);
  const { ids, points, seen, keys } = state;
  const room = points.size >= B && seen.size >= B * words && (!draw || keys.size >= B * V);
  if (ids.size !== B || !room || barred > state.barred.size) {
    throw new ShapeError(`sample: the state does not fit ${B} rows of ${V} logits`);
  }
  logits.device.dispatch(
    kernel,
    { logits, ...state },
    {
      vocab: V,
      pitch: logits.pitch,
      words,
      barred_count: barred,
      penalty,
      temperature,
      top_k: topK,
      tail: 1 - topP,
      min_p: draw ? minP : 0,
      bits: 32,
    },
    B,
    {
      constants: {
        DRAW: draw ? 1 : 0,
        PENALTY: penalty === 1 ? 0 : 1,
        TOP_K: draw && topK > 0 && topK < V ? 1 : 0,
        TOP_P: draw && topP < 1 ? 1 : 0,
      },
    },
  );
}
