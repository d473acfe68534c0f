/**
 * The baseline that a language model has to beat: logistic regression over the words and word pairs of a text.
 * It knows nothing before training and sees no order beyond neighbours.
 */

/** A trained classifier. */
export interface BagOfWords {
  readonly classes: readonly string[];
  /** The most probable class; among equals the first. */
  predict(text: string): string;
}

/** Settings of {@link trainBagOfWords}. */
export interface BagOfWordsOptions {
  /** Inverse strength of the L2 penalty, as scikit-learn's C: the penalty is `|w|^2 / 2`, the loss is summed times C. Default 10. */
  readonly c?: number;
  /** Stop when no component of the gradient of the mean loss exceeds this. Default 1e-4. */
  readonly tolerance?: number;
  /** At most so many steps of L-BFGS. Default 200. */
  readonly maxSteps?: number;
}

/** Lower-cased words and numbers of two or more characters, and the pairs of neighbours. */
function features(text: string): string[] {
  const words = text.toLowerCase().match(/[\p{L}\p{N}_]{2,}/gu) ?? [];
  return [...words, ...words.slice(1).map((word, i) => `${words[i]} ${word}`)];
}

/** A sparse row: feature numbers and weights, of Euclidean length 1. */
interface Row {
  readonly at: Int32Array;
  readonly weight: Float64Array;
}

/**
 * Trains by L-BFGS to convergence, deterministically. Features are weighted by tf-idf (smoothed as
 * `ln((1 + n) / (1 + df)) + 1`), rows have length 1, and each class has an unpenalised bias.
 * Throws a RangeError when `texts` and `labels` differ in length or there are fewer than two classes.
 */
export function trainBagOfWords(
  texts: readonly string[],
  labels: readonly string[],
  options: BagOfWordsOptions = {},
): BagOfWords {
  if (texts.length !== labels.length) {
    throw new RangeError(`bag of words: ${texts.length} texts but ${labels.length} labels`);
  }
  const classes = [...new Set(labels)].sort();
  if (classes.length < 2) throw new RangeError(`bag of words: needs two classes or more, got [${classes.join(', ')}]`);
  const { c = 10, tolerance = 1e-4, maxSteps = 200 } = options;

  const vocabulary = new Map<string, number>();
  const documents: number[] = [];
  for (const text of texts) {
    for (const feature of new Set(features(text))) {
      const known = vocabulary.get(feature);
      if (known === undefined) documents[vocabulary.set(feature, vocabulary.size).size - 1] = 1;
      else documents[known] = (documents[known] as number) + 1;
    }
  }
  const idf = Float64Array.from(documents, (count) => Math.log((1 + texts.length) / (1 + count)) + 1);
  const toRow = (text: string): Row => {
    const counts = new Map<number, number>();
    for (const feature of features(text)) {
      const i = vocabulary.get(feature);
      if (i !== undefined) counts.set(i, (counts.get(i) ?? 0) + 1);
    }
    const at = Int32Array.from(counts.keys());
    const weight = Float64Array.from(counts, ([i, count]) => count * (idf[i] as number));
    const length = Math.hypot(...weight) || 1;
    return { at, weight: weight.map((x) => x / length) };
  };

  const rows = texts.map(toRow);
  const targets = labels.map((label) => classes.indexOf(label));
  const k = classes.length;
  const size = (vocabulary.size + 1) * k;
  const bias = vocabulary.size * k;
  const scores = new Float64Array(k);
  const score = (w: Float64Array, row: Row): void => {
    for (let j = 0; j < k; j++) scores[j] = w[bias + j] as number;
    for (let i = 0; i < row.at.length; i++) {
      const from = (row.at[i] as number) * k;
      for (let j = 0; j < k; j++)
        scores[j] = (scores[j] as number) + (row.weight[i] as number) * (w[from + j] as number);
    }
  };
  /** Mean loss with the penalty; fills `gradient`. */
  const objective = (w: Float64Array, gradient: Float64Array): number => {
    const penalty = 1 / (c * rows.length);
    let loss = 0;
    for (let i = 0; i < bias; i++) {
      const x = w[i] as number;
      loss += (x * x * penalty) / 2;
      gradient[i] = x * penalty;
    }
    gradient.fill(0, bias);
    rows.forEach((row, r) => {
      score(w, row);
      const top = Math.max(...scores);
      let sum = 0;
      for (let j = 0; j < k; j++) sum += Math.exp((scores[j] as number) - top);
      const target = targets[r] as number;
      loss += (Math.log(sum) + top - (scores[target] as number)) / rows.length;
      for (let j = 0; j < k; j++) {
        const d = (Math.exp((scores[j] as number) - top) / sum - (j === target ? 1 : 0)) / rows.length;
        gradient[bias + j] = (gradient[bias + j] as number) + d;
        for (let i = 0; i < row.at.length; i++) {
          const to = (row.at[i] as number) * k + j;
          gradient[to] = (gradient[to] as number) + d * (row.weight[i] as number);
        }
      }
    });
    return loss;
  };
  const weights = minimise(objective, size, tolerance, maxSteps);
  return {
    classes,
    predict: (text) => {
      score(weights, toRow(text));
      let best = 0;
      for (let j = 1; j < k; j++) if ((scores[j] as number) > (scores[best] as number)) best = j;
      return classes[best] as string;
    },
  };
}

/** L-BFGS with a backtracking line search (Nocedal and Wright, algorithms 7.4 and 3.1), from zero. */
function minimise(
  objective: (w: Float64Array, gradient: Float64Array) => number,
  size: number,
  tolerance: number,
  maxSteps: number,
): Float64Array {
  const memory: { s: Float64Array; y: Float64Array; rho: number }[] = [];
  let w: Float64Array = new Float64Array(size);
  let gradient: Float64Array = new Float64Array(size);
  let loss = objective(w, gradient);
  for (let step = 0; step < maxSteps; step++) {
    if (gradient.every((x) => Math.abs(x) <= tolerance)) break;
    const direction = gradient.map((x) => -x);
    const alphas: number[] = [];
    for (const { s, y, rho } of [...memory].reverse()) {
      const alpha = rho * dot(s, direction);
      alphas.push(alpha);
      addScaled(direction, y, -alpha);
    }
    const newest = memory[memory.length - 1];
    if (newest !== undefined) {
      const scale = 1 / (newest.rho * dot(newest.y, newest.y));
      for (let i = 0; i < size; i++) direction[i] = (direction[i] as number) * scale;
    }
    for (const { s, y, rho } of memory) addScaled(direction, s, (alphas.pop() as number) - rho * dot(y, direction));

    const slope = dot(gradient, direction);
    let rate = 1;
    let next = new Float64Array(0);
    const nextGradient = new Float64Array(size);
    let nextLoss = Number.POSITIVE_INFINITY;
    for (; rate > 1e-10; rate /= 2) {
      next = w.slice();
      addScaled(next, direction, rate);
      nextLoss = objective(next, nextGradient);
      if (nextLoss <= loss + 1e-4 * rate * slope) break;
    }
    if (!(nextLoss < loss)) break;
    const s = next.slice();
    addScaled(s, w, -1);
    const y = nextGradient.slice();
    addScaled(y, gradient, -1);
    const curvature = dot(s, y);
    if (curvature > 1e-12) memory.push({ s, y, rho: 1 / curvature });
    if (memory.length > 10) memory.shift();
    w = next;
    gradient = nextGradient;
    loss = nextLoss;
  }
  return w;
}

function dot(x: Float64Array, y: Float64Array): number {
  let sum = 0;
  for (let i = 0; i < x.length; i++) sum += (x[i] as number) * (y[i] as number);
  return sum;
}

/** x += scale * y */
function addScaled(x: Float64Array, y: Float64Array, scale: number): void {
  for (let i = 0; i < x.length; i++) x[i] = (x[i] as number) + scale * (y[i] as number);
}

/** The most frequent label; among equals the first in alphabetical order. Throws a RangeError on an empty list. */
export function majorityClass(labels: readonly string[]): string {
  const counts = new Map<string, number>();
  for (const label of [...labels].sort()) counts.set(label, (counts.get(label) ?? 0) + 1);
  let best: string | undefined;
  for (const [label, count] of counts) if (best === undefined || count > (counts.get(best) ?? 0)) best = label;
  if (best === undefined) throw new RangeError('majority class: there are no labels');
  return best;
}
