/** Numerical check of a gradient against central differences, for ops and modules of your own. */
import { type Device, keep, scope, type Tensor } from '@lorikeet/tensor';
import { valueAndGrad } from './tape.js';

/** Result of `gradcheck`: both directional derivatives, and their relative difference. */
export interface GradcheckResult {
  readonly analytic: number;
  readonly numeric: number;
  readonly relativeError: number;
}

/**
 * Compares the gradient of a scalar function with (f(x + h d) - f(x - h d)) / 2h along a random direction d.
 * @param fn scalar function of f32 tensors on `device`
 * @param inputs values and shapes to check at
 * @param options `step` h (default 1e-2: f32 forward passes leave about 1e-4 relative), `seed` of the direction
 */
export async function gradcheck(
  device: Device,
  fn: (...inputs: Tensor[]) => Tensor,
  inputs: readonly { readonly data: ArrayLike<number>; readonly shape: readonly number[] }[],
  options: { readonly step?: number; readonly seed?: number } = {},
): Promise<GradcheckResult> {
  const h = options.step ?? 1e-2;
  let state = (options.seed ?? 1) >>> 0;
  // A linear congruential generator (Numerical Recipes) is random enough for a direction.
  const random = (): number => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    return state / 2 ** 31 - 1;
  };
  const directions = inputs.map(({ data }) => Array.from({ length: data.length }, random));
  const at = async (sign: number): Promise<number> => {
    const y = scope(() =>
      keep(
        fn(
          ...inputs.map(({ data, shape }, i) =>
            device.fromArray(
              Array.from(data, (v, j) => v + sign * h * directions[i][j]),
              shape,
            ),
          ),
        ),
      ),
    );
    const value = await y.item();
    y.dispose();
    return value;
  };
  const grads = scope(() => {
    const xs = inputs.map(({ data, shape }) => device.fromArray(data, shape));
    return keep([...valueAndGrad(() => fn(...xs), xs).grads]);
  });
  let analytic = 0;
  for (const [i, grad] of grads.entries()) {
    const values = await grad.read();
    values.forEach((g, j) => {
      analytic += g * directions[i][j];
    });
    grad.dispose();
  }
  const numeric = ((await at(1)) - (await at(-1))) / (2 * h);
  return {
    analytic,
    numeric,
    relativeError: Math.abs(analytic - numeric) / Math.max(Math.abs(analytic), Math.abs(numeric), 1e-8),
  };
}
