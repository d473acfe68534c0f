/** Completion-only language-model loss of one padded batch: only supervised rows reach the head. */
import { checkpoint } from '@lorikeet/autograd';
import type { CausalLM, ModelInput } from '@lorikeet/nn';
import {
  add,
  crossEntropy,
  currentRecorder,
  type Device,
  gatherRows,
  linearCrossEntropy,
  logitsRows,
  reshape,
  type Tensor,
} from '@lorikeet/tensor';
import { type Batch, ignoreIndex } from './data.js';

/** Supervised rows are filled up to a multiple of this, so that few shapes occur and buffers are reused. */
const rowMultiple = 64;

/** Loss and count of right predictions, both f32 scalars on the device. */
export interface BatchLoss {
  /** Sum over supervised tokens of -log p, divided by `normaliser`. */
  readonly loss: Tensor;
  /** Supervised tokens whose most probable token is the label. */
  readonly correct: Tensor;
}

/**
 * Forward pass and loss of a batch. The label of a token is predicted by the token before it.
 * @param normaliser what the sum is divided by: the supervised tokens of the whole accumulation window
 * @param options `smoothing`: the share of label smoothing, default 0
 */
export function batchLoss(
  model: CausalLM,
  batch: Batch,
  normaliser: number,
  options: { readonly checkpointing?: boolean; readonly smoothing?: number } = {},
): BatchLoss {
  const supervised = Array.from({ length: batch.B }, (_, b) => supervisedOf(batch, b));
  const rows = supervised.flatMap((of) => of.positions);
  const targets = supervised.flatMap((of) => of.labels);
  if (rows.length === 0)
    throw new RangeError('batchLoss: no token of the batch is supervised; its loss would be 0 / 0');
  fillUp(rows, targets, batch.B * batch.T);
  const chunk = logitsRows(model.vocabSize);
  const head = model.headWeight;
  // A head that is trained runs again in backward: its gradient is collected chunk by chunk.
  const frozen = head !== undefined && currentRecorder()?.tracks(head) !== true;
  const pieces = frozen ? [rows.length] : sizes(rows.length, chunk);
  const lists = [rows, targets].flatMap((list) => {
    let from = 0;
    return pieces.map((size) => list.slice(from, (from += size)));
  });
  const { input, i32 } = upload(firstDevice(model), batch, lists);
  const h = flat(model.hidden(input, options));
  const settings = { scale: 1 / normaliser, smoothing: options.smoothing ?? 0 };
  if (frozen) return linearCrossEntropy(h, head, i32[0], i32[1], { ...settings, chunk });
  const run = (x: Tensor, at: Tensor, wanted: Tensor): readonly Tensor[] => {
    const { loss, correct } = crossEntropy(model.logits(gatherRows(x, at)), wanted, settings);
    return [loss, correct];
  };
  let total: BatchLoss | undefined;
  for (const [i, index] of i32.slice(0, pieces.length).entries()) {
    const labels = i32[pieces.length + i];
    const [loss, correct] = pieces.length > 1 ? checkpoint(run, h, index, labels) : run(h, index, labels);
    total =
      total === undefined ? { loss, correct } : { loss: add(total.loss, loss), correct: add(total.correct, correct) };
  }
  if (total === undefined) throw new RangeError('batchLoss: no chunk');
  return total;
}

/** Adds unsupervised rows, each once, until their number is a multiple of `rowMultiple` or all `available` are there. */
function fillUp(rows: number[], targets: number[], available: number): void {
  const wanted = Math.min(available, Math.ceil(rows.length / rowMultiple) * rowMultiple);
  const taken = new Set(rows);
  for (let row = 0; rows.length < wanted; row++) {
    if (taken.has(row)) continue;
    rows.push(row);
    targets.push(ignoreIndex);
  }
}

/** Parts of `total` of at most `most`. */
function sizes(total: number, most: number): number[] {
  return Array.from({ length: Math.ceil(total / most) }, (_, i) => Math.min(most, total - i * most));
}

/** Where the supervised labels of row b are predicted (the token before each, in [0, B T)), and the labels. @internal */
export function supervisedOf({ labels, T }: Batch, b: number): { positions: number[]; labels: number[] } {
  const found: { positions: number[]; labels: number[] } = { positions: [], labels: [] };
  for (let t = 1; t < T; t++) {
    const label = labels[b * T + t];
    if (label === ignoreIndex) continue;
    found.positions.push(b * T + t - 1);
    found.labels.push(label);
  }
  return found;
}

/** Hidden states of a batch, [B T, D]. @internal */
export function flatHidden(model: CausalLM, batch: Batch): Tensor {
  return flat(model.hidden(upload(firstDevice(model), batch, []).input));
}

function flat(hidden: Tensor): Tensor {
  const [B, T, D] = hidden.shape;
  return reshape(hidden, [B * T, D]);
}

/** A batch on the device, and lists of integers beside it, all in one write. */
function upload(
  device: Device,
  { ids, spans, documents, B, T }: Batch,
  lists: readonly (readonly number[])[],
): { readonly input: ModelInput; readonly i32: Tensor[] } {
  const parts: readonly { readonly values: ArrayLike<number>; readonly shape: readonly number[] }[] = [
    { values: ids, shape: [B, T] },
    documents === undefined ? { values: spans, shape: [B, 2] } : { values: documents, shape: [B, T, 2] },
    ...lists.map((values) => ({ values, shape: [values.length] })),
  ];
  // Slices begin at multiples of 256 bytes.
  const starts = [0];
  for (const { values } of parts) starts.push(starts[starts.length - 1] + Math.ceil(values.length / 64) * 64);
  const all = new Int32Array(starts[parts.length]);
  for (const [i, { values }] of parts.entries()) all.set(values, starts[i]);
  const tensor = device.fromArray(all, [all.length], 'i32');
  const [idsThere, spansThere, ...i32] = parts.map(({ shape }, i) => tensor.slice(4 * starts[i], shape));
  return { input: { ids: idsThere, spans: spansThere }, i32 };
}

function firstDevice(model: CausalLM): Device {
  for (const [, p] of model.namedParameters()) return p.device;
  throw new RangeError('batchLoss: the model has no parameters');
}
