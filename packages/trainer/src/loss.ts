/** Completion-only language-model loss of one padded batch: only supervised rows reach the head. */
import { checkpoint } from '@lorikeet/autograd';
import type { CausalLM } from '@lorikeet/nn';
import { add, crossEntropy, gatherRows, reshape, type Tensor } from '@lorikeet/tensor';
import { type Batch, ignoreIndex } from './data.js';

/** Bytes of logits that exist at a time; more rows go through the head in chunks that backward computes again. */
const logitsBytes = 48 << 20;

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
 */
export function batchLoss(
  model: CausalLM,
  batch: Batch,
  normaliser: number,
  options: { readonly checkpointing?: boolean } = {},
): BatchLoss {
  const supervised = Array.from({ length: batch.B }, (_, b) => supervisedOf(batch, b));
  const rows = supervised.flatMap((of) => of.positions);
  const targets = supervised.flatMap((of) => of.labels);
  if (rows.length === 0)
    throw new RangeError('batchLoss: no token of the batch is supervised; its loss would be 0 / 0');
  const h = flatHidden(model, batch, options);
  const { device } = h;
  const chunk = logitsRows(model.vocabSize);
  let total: BatchLoss | undefined;
  for (let from = 0; from < rows.length; from += chunk) {
    const to = Math.min(rows.length, from + chunk);
    const index = device.fromArray(rows.slice(from, to), [to - from], 'i32');
    const labels = device.fromArray(targets.slice(from, to), [to - from], 'i32');
    const run = (x: Tensor, at: Tensor, wanted: Tensor): readonly Tensor[] => {
      const { loss, correct } = crossEntropy(model.logits(gatherRows(x, at)), wanted, { scale: 1 / normaliser });
      return [loss, correct];
    };
    const [loss, correct] = rows.length > chunk ? checkpoint(run, h, index, labels) : run(h, index, labels);
    total =
      total === undefined ? { loss, correct } : { loss: add(total.loss, loss), correct: add(total.correct, correct) };
  }
  if (total === undefined) throw new RangeError('batchLoss: no chunk');
  return total;
}

/** Rows of logits that are made at a time. @internal */
export function logitsRows(vocabSize: number): number {
  return Math.max(16, Math.floor(logitsBytes / (4 * vocabSize)));
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
export function flatHidden(
  model: CausalLM,
  { ids, spans, B, T }: Batch,
  options: { readonly checkpointing?: boolean } = {},
): Tensor {
  const device = firstDevice(model);
  const hidden = model.hidden(
    { ids: device.fromArray(ids, [B, T], 'i32'), spans: device.fromArray(spans, [B, 2], 'i32') },
    options,
  );
  return reshape(hidden, [B * T, hidden.shape[2]]);
}

function firstDevice(model: CausalLM): Tensor['device'] {
  for (const [, p] of model.namedParameters()) return p.device;
  throw new RangeError('batchLoss: the model has no parameters');
}
