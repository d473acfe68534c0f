/** How far a merged model is from its base and adapter: logits and answers to the same prompts. */
import type { Mistral, Tokenizer } from '@lorikeet/mistral';
import { Random, randomStreams } from '@lorikeet/nn';
import { gatherRows, keep, reshape, scope } from '@lorikeet/tensor';
import { encodePrompt, isConversation, prepareRows, textFields, type TokenizeOptions } from '@lorikeet/trainer';
import { type Config, resolveConfig } from './config.js';
import type { CommandContext } from './context.js';
import type { PlacedRow } from './data-files.js';
import { UsageError } from './errors.js';
import { classesOf, mostClasses, scoreLabels } from './label-scores.js';
import { readRows, rowTemplate, runTemplate } from './run-data.js';
import { formatCount, formatNumber } from './text.js';

/** What two models are compared on. */
export interface Prompts {
  readonly ids: readonly (readonly number[])[];
  /** Rows of which each label is scored. */
  readonly labelled:
    | { readonly rows: readonly PlacedRow[]; readonly tokenize: TokenizeOptions; readonly labels: readonly string[] }
    | undefined;
}

/** What a model says to the prompts. */
export interface Answers {
  /** Logits [positions, V] of the last positions of each prompt. */
  readonly logits: readonly Float32Array[];
  /** The most probable label of each row. */
  readonly labels: readonly string[] | undefined;
}

/** How far two models are from each other. */
export interface Verification {
  readonly prompts: number;
  /** Largest absolute difference of a logit. */
  readonly max_logit_difference: number;
  /** Norm of the difference over the norm of the logits. */
  readonly relative_difference: number;
  /** Positions whose most probable token is another one. */
  readonly argmax_flips: number;
  readonly positions: number;
  /** Prompts whose most probable label is another one; null where no labels are scored. */
  readonly label_flips: number | null;
  readonly labels: readonly string[] | null;
}

/** Texts for comparing where no prompts are given. */
const ownTexts: readonly string[] = [
  'Net sales rose 12 % from the year before, and the operating profit was EUR 3.1 mn.',
  'The company said that it will lay off 200 people and close one of its plants.',
  'Instruction: Is this good or bad news?\nInput: Orders fell in the third quarter.\nAnswer:',
  'Once upon a time, there was a little bird that could sing every song it had heard.',
];

/** Bytes of logits that are kept for comparing: of many prompts, the last positions alone. */
const keptBytes = 256e6;

/** Prompts of one's own, the same every time: texts, or without a tokenizer random ids. */
export function ownPrompts(vocabSize: number, tokenizer: Tokenizer | undefined): Prompts {
  if (tokenizer !== undefined) return { ids: ownTexts.map((text) => tokenizer.encode(text)), labelled: undefined };
  const random = new Random(1, randomStreams.user);
  const ids = ownTexts.map(() => Array.from({ length: 32 }, () => Math.floor(random.uniform() * vocabSize)));
  return { ids, labelled: undefined };
}

/**
 * The prompts of a data file, with the template of a run. The labels are the given ones, else the rows' own answers where
 * these are few enough to be classes.
 */
export async function readPrompts(
  context: CommandContext,
  file: string,
  options: {
    readonly tokenizer: Tokenizer;
    readonly config: Config | undefined;
    readonly labels: readonly string[] | undefined;
  },
): Promise<Prompts> {
  const given = await readRows(context, [file]);
  const config = options.config ?? resolveConfig({}).config;
  const [{ fields }] = given;
  const template = isConversation(fields)
    ? rowTemplate(config, options.tokenizer, fields)
    : // Rows need no answer here: its field is there for the choice of the template.
      runTemplate(config, [...Object.keys(fields), 'completion', 'output']);
  const rows = prepareRows(given, template);
  const structured = !template.promptFields.includes(template.completionField);
  if (options.labels !== undefined && !structured) {
    throw new UsageError('labels cannot be scored for rows that are one text', {
      where: file,
      fix: 'Give rows with fields of their own for prompt and answer, or leave --labels out.',
    });
  }
  const truths = rows.map((row) => template.completion(textFields(row, template)).trim());
  const known = structured && truths.every((truth) => truth !== '') && new Set(truths).size <= mostClasses;
  const labels = options.labels ?? (known ? classesOf(truths, file) : undefined);
  const tokenize: TokenizeOptions = {
    tokenizer: options.tokenizer,
    template,
    ...(labels === undefined ? {} : { labels }),
  };
  return {
    ids: rows.map((row, index) => encodePrompt(row, tokenize, index).ids),
    labelled: labels === undefined ? undefined : { rows, tokenize, labels },
  };
}

/** Lets a model answer. */
export async function answersOf(context: CommandContext, model: Mistral, prompts: Prompts): Promise<Answers> {
  const { device } = model.model.norm.weight;
  const { ui, signal } = context;
  const most = Math.max(1, Math.floor(keptBytes / (4 * model.vocabSize * prompts.ids.length)));
  const progress = ui.progress('comparing', { total: prompts.ids.length });
  const logits: Float32Array[] = [];
  try {
    for (const prompt of prompts.ids) {
      signal.throwIfAborted();
      const T = prompt.length;
      const y = scope(() => {
        const ids = device.fromArray(prompt, [1, T], 'i32');
        const hidden = model.hidden({ ids, spans: device.fromArray([0, T], [1, 2], 'i32') });
        const rows = Int32Array.from({ length: Math.min(T, most) }, (_, i) => Math.max(0, T - most) + i);
        const last = gatherRows(
          reshape(hidden, [T, model.config.hidden_size]),
          device.fromArray(rows, [rows.length], 'i32'),
        );
        return keep(model.logits(last));
      });
      logits.push(new Float32Array(await y.read()));
      y.dispose();
      progress.update(logits.length);
    }
  } finally {
    progress.done();
  }
  const { labelled } = prompts;
  if (labelled === undefined) return { logits, labels: undefined };
  const { tokenizer } = labelled.tokenize;
  const scored = await scoreLabels(context, model, labelled.rows, labelled.tokenize, {
    labels: labelled.labels,
    batchSize: 8,
    pad: { padTokenId: tokenizer.padTokenId ?? tokenizer.eosTokenId ?? 0 },
  });
  return { logits, labels: scored.map(({ text }) => text) };
}

/** Compares the answers of two models with as many tokens. */
export function compareAnswers(
  before: Answers,
  after: Answers,
  { prompts, vocabSize }: { readonly prompts: Prompts; readonly vocabSize: number },
): Verification {
  let most = 0;
  let squares = 0;
  let base = 0;
  let flips = 0;
  let positions = 0;
  for (const [i, a] of before.logits.entries()) {
    const b = after.logits[i];
    for (let at = 0; at < a.length; at += vocabSize, positions++) {
      const [rowA, rowB] = [a.subarray(at, at + vocabSize), b.subarray(at, at + vocabSize)];
      let [bestA, bestB] = [0, 0];
      for (let v = 0; v < vocabSize; v++) {
        const difference = Math.abs(rowB[v] - rowA[v]);
        // A NaN stays one: it must not pass as no difference.
        most = Math.max(most, difference);
        squares += difference * difference;
        base += rowA[v] * rowA[v];
        if (rowA[v] > rowA[bestA]) bestA = v;
        if (rowB[v] > rowB[bestB]) bestB = v;
      }
      if (bestA !== bestB) flips++;
    }
  }
  return {
    prompts: before.logits.length,
    max_logit_difference: most,
    relative_difference: base === 0 ? 0 : Math.sqrt(squares / base),
    argmax_flips: flips,
    positions,
    label_flips: before.labels?.filter((label, i) => label !== after.labels?.[i]).length ?? null,
    labels: prompts.labelled?.labels ?? null,
  };
}

/** The comparison in a sentence. */
export function describeVerification(found: Verification): string {
  const { max_logit_difference: most, relative_difference: relative, argmax_flips: flips, label_flips } = found;
  const labels =
    label_flips === null
      ? 'no labels were compared'
      : `${formatCount(label_flips)} of ${formatCount(found.prompts)} labels changed`;
  return (
    `against base and adapter: logits differ by at most ${formatNumber(most)} (relative ${formatNumber(relative)}); ` +
    `${formatCount(flips)} of ${formatCount(found.positions)} most probable tokens changed; ${labels}`
  );
}
