/** Which of some labels a model holds for the answer to a row. */
import type { CausalLM } from '@lorikeet/nn';
import { scoreCompletions, tokenizeExample, type TokenizeOptions } from '@lorikeet/trainer';
import type { CommandContext } from './context.js';
import type { PlacedRow } from './data-files.js';
import { UsageError } from './errors.js';
import { formatCount } from './text.js';

/** Most different completions that count as classes when no labels are given. */
export const mostClasses = 20;

/** What the model said of one row. */
export interface Answer {
  /** The text as it was generated, or the chosen label. */
  readonly text: string;
  readonly label: string | undefined;
  /** Probability of each label among the labels, when they were scored. */
  readonly probabilities?: Readonly<Record<string, number>>;
}

/**
 * The different answers of labelled rows.
 * @throws UsageError when they are too many to be classes
 */
export function classesOf(truths: readonly string[], data: string): string[] {
  const classes = [...new Set(truths.filter((truth) => truth !== ''))].sort();
  if (classes.length <= mostClasses) return classes;
  throw new UsageError(
    `the rows have ${formatCount(classes.length)} different answers, too many to be classes (at most ${mostClasses})`,
    { where: data, fix: 'Name the classes with --labels negative,neutral,positive.' },
  );
}

/** Chooses for each row the label whose tokens, with the end behind them, are most probable. */
export async function scoreLabels(
  context: CommandContext,
  model: CausalLM,
  rows: readonly PlacedRow[],
  tokenize: TokenizeOptions,
  {
    labels,
    batchSize,
    pad,
  }: { readonly labels: readonly string[]; readonly batchSize: number; readonly pad: { padTokenId: number } },
): Promise<Answer[]> {
  const { completionField } = tokenize.template;
  const candidates = rows.flatMap((row, index) =>
    labels.map((label) =>
      tokenizeExample({ ...row, fields: { ...row.fields, [completionField]: label } }, tokenize, index),
    ),
  );
  const progress = context.ui.progress('scoring labels', { total: candidates.length });
  try {
    const { logProb } = await scoreCompletions(model, candidates, {
      batchSize,
      collate: pad,
      signal: context.signal,
      onProgress: (done) => progress.update(done),
    });
    return rows.map((_, row) => {
      const scores = Array.from(logProb.subarray(row * labels.length, (row + 1) * labels.length));
      const best = Math.max(...scores);
      const weights = scores.map((score) => Math.exp(score - best));
      const sum = weights.reduce((a, b) => a + b, 0);
      const label = labels[scores.indexOf(best)];
      return {
        text: label,
        label,
        probabilities: Object.fromEntries(labels.map((name, i) => [name, weights[i] / sum])),
      };
    });
  } finally {
    progress.done();
  }
}
