/** The two shapes of spans: one a row, or one for each position of a row. */
import type { Tensor } from './tensor.js';

/** Spans of rows, [B, 2], as [B, 1, 2]; those of positions, [B, N, 2], as they are. */
export function positionSpans(spans: Tensor): Tensor {
  const { shape } = spans;
  return shape.length === 2 ? spans.view([shape[0], 1, shape[1]]) : spans;
}
