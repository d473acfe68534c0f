/** Scores of a classifier whose answers are texts. Counted on the CPU, exact. */

/** Scores of one class. */
export interface ClassScores {
  readonly label: string;
  /** Right among the answers of this class; 0 where the class was never answered. */
  readonly precision: number;
  /** Found among the rows of this class; 0 where there is no such row. */
  readonly recall: number;
  /** Harmonic mean of precision and recall; 0 where both are. */
  readonly f1: number;
  /** Rows of this class. */
  readonly support: number;
  /** Answers of this class. */
  readonly predicted: number;
}

/** Scores of a classifier over all rows. */
export interface ClassificationMetrics {
  readonly count: number;
  readonly correct: number;
  readonly accuracy: number;
  /** Mean F1 of the classes, each counted once, also those without rows. */
  readonly macroF1: number;
  /** Mean F1 of the classes, weighted by their rows. */
  readonly weightedF1: number;
  /** Answers that are none of the labels. They count as wrong and belong to no class. */
  readonly invalid: number;
  readonly invalidShare: number;
  readonly labels: readonly string[];
  readonly classes: readonly ClassScores[];
  /** `confusion[i][j]`: rows of class i answered as class j; the last column, j = labels.length, counts invalid answers. */
  readonly confusion: readonly (readonly number[])[];
}

const sum = (values: readonly number[]): number => values.reduce((a, b) => a + b, 0);
const ratio = (part: number, whole: number): number => (whole === 0 ? 0 : part / whole);

/** Counts answers as they come: scores are there at any time, and no rows are held. */
export class ConfusionCounter {
  readonly #labels: readonly string[];
  readonly #indexOf: ReadonlyMap<string, number>;
  /** Rows: right class; columns: answered class, the last one invalid. */
  readonly #counts: readonly number[][];
  #count = 0;
  #correct = 0;

  /**
   * @param labels the classes, in the order of the table
   * @throws RangeError for no labels, or repeated ones
   */
  constructor(labels: readonly string[]) {
    this.#labels = [...labels];
    this.#indexOf = new Map(labels.map((label, i) => [label, i]));
    if (labels.length === 0 || this.#indexOf.size !== labels.length) {
      throw new RangeError(
        `classification: labels must be at least one and all different; got ${JSON.stringify(labels)}`,
      );
    }
    this.#counts = labels.map(() => Array.from({ length: labels.length + 1 }, () => 0));
  }

  /** Share of right answers so far; NaN before the first. */
  get accuracy(): number {
    return this.#correct / this.#count;
  }

  /**
   * Counts one row.
   * @param truth its right label
   * @param answer undefined, null and texts that are no label are invalid
   * @throws RangeError where the right label is unknown
   */
  add(truth: string, answer: string | null | undefined): void {
    const i = this.#indexOf.get(truth);
    if (i === undefined) {
      throw new RangeError(
        `classification: row ${this.#count + 1} has the right label ${JSON.stringify(truth)}, which is none of ${this.#labels.join(', ')}`,
      );
    }
    const j = typeof answer === 'string' ? this.#indexOf.get(answer) : undefined;
    this.#counts[i][j ?? this.#labels.length]++;
    this.#count++;
    if (i === j) this.#correct++;
  }

  /**
   * All scores of the rows so far.
   * @throws RangeError before the first row
   */
  metrics(): ClassificationMetrics {
    if (this.#count === 0) throw new RangeError('classification: there are no rows to score');
    const labels = this.#labels;
    const confusion = this.#counts.map((row) => [...row]);
    const classes = labels.map((label, i): ClassScores => {
      const hits = confusion[i][i];
      const support = sum(confusion[i]);
      const predicted = sum(confusion.map((row) => row[i]));
      return {
        label,
        precision: ratio(hits, predicted),
        recall: ratio(hits, support),
        f1: ratio(2 * hits, predicted + support),
        support,
        predicted,
      };
    });
    const invalid = sum(confusion.map((row) => row[labels.length]));
    return {
      count: this.#count,
      correct: this.#correct,
      accuracy: this.accuracy,
      macroF1: sum(classes.map((c) => c.f1)) / labels.length,
      weightedF1: sum(classes.map((c) => c.f1 * c.support)) / this.#count,
      invalid,
      invalidShare: invalid / this.#count,
      labels: [...labels],
      classes,
      confusion,
    };
  }
}

/**
 * Accuracy, F1 and the confusion table. F1 is that of scikit-learn's `f1_score(truth, answers, labels=labels, zero_division=0)`,
 * with invalid answers as a class of their own outside `labels`: they lower recall, never precision.
 *
 * @param truth the right label of every row
 * @param answers the answer to every row; undefined, null and texts that are no label are invalid
 * @param labels the classes, in the order of the table
 * @throws RangeError for lists of different lengths, no rows, repeated labels, or a row whose right label is unknown
 */
export function classificationMetrics(
  truth: readonly string[],
  answers: readonly (string | null | undefined)[],
  labels: readonly string[],
): ClassificationMetrics {
  if (truth.length !== answers.length) {
    throw new RangeError(`classification: ${truth.length} right labels but ${answers.length} answers`);
  }
  const counter = new ConfusionCounter(labels);
  for (const [row, label] of truth.entries()) counter.add(label, answers[row]);
  return counter.metrics();
}

/**
 * The label that an answer is, or undefined. White space around it, a closing full stop and the case of letters don't matter;
 * anything more ("positive or neutral", "very positive") is no answer: a scorer that looked for labels anywhere in the text
 * would turn garbage into classes.
 */
export function matchLabel(answer: string, labels: readonly string[]): string | undefined {
  const text = answer.trim().replace(/\.$/, '').trimEnd();
  if (labels.includes(text)) return text;
  const folded = text.toLowerCase();
  const matches = labels.filter((label) => label.toLowerCase() === folded);
  return matches.length === 1 ? matches[0] : undefined;
}
