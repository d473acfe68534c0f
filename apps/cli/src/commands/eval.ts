/** `lorikeet eval`: how well a model answers labelled rows. */
import { join } from 'node:path';
import { generate, type ResolvedGenerationConfig, resolveGenerationConfig, type Tokenizer } from '@lorikeet/mistral';
import {
  type ClassificationMetrics,
  classificationMetrics,
  ConfusionCounter,
  DataError,
  encodePrompt,
  prepareRows,
  evaluateLoss,
  matchLabel,
  type PromptTemplate,
  rowName,
  terminatorOf,
  textFields,
  type TokenizeOptions,
} from '@lorikeet/trainer';
import { type Config, type ConfigDType, loadConfig, resolveConfig } from '../config.js';
import { withRunChatTemplate } from '../chat-templates.js';
import type { CommandContext } from '../context.js';
import type { PlacedRow } from '../data-files.js';
import { type Answer, classesOf, scoreLabels } from '../label-scores.js';
import { writeTokenLosses } from '../reporting/overview.js';
import { readRows, rowTemplate, tokenizeRows, withSpecialTokens } from '../run-data.js';
import { readRunConfig } from '../run-files.js';
import { openSession, readSession, requireTokenizer, type Session } from '../session.js';
import { formatCount, formatNumber, printable, quoted, shellQuoted } from '../text.js';
import { writeFileAtomic, writeJsonAtomic } from '../write.js';

/** Options of the command. */
export interface EvalOptions {
  readonly model: string;
  readonly adapter?: string;
  readonly data: string;
  readonly labels?: readonly string[];
  readonly output?: string;
  /** Rows whose losses token by token are written to `output`. */
  readonly tokenLosses?: number;
  readonly batchSize: number;
  readonly maxNewTokens: number;
  readonly limit?: number;
  readonly config?: string;
  readonly dtype?: ConfigDType;
  readonly loadIn4bit?: boolean;
  readonly revision?: string;
  readonly cacheDir?: string;
  readonly offline?: boolean;
}

/** Runs the command. */
export async function runEval(context: CommandContext, options: EvalOptions): Promise<void> {
  const { ui } = context;
  const read = await readSession(context, options);
  const config = await templateConfig(context, options, read.adapterFiles?.folder);
  const known = requireTokenizer(read.tokenizer, read.files.folder);
  const { tokenizer: named, added } = withSpecialTokens(known, config.special_tokens);
  // An adapter's tokenizer has its template; the path in its run file may mean nothing here.
  const tokenizer = options.config === undefined ? named : await withRunChatTemplate(named, config);
  if (added.length > 0) {
    ui.warn(`${added.length} special tokens of the run file are new to the model; their rows are untrained`);
  }
  const given = (await readRows(context, [options.data])).slice(0, options.limit);
  const template = rowTemplate(config, tokenizer, given[0].fields);
  const rows = prepareRows(given, template);
  const truths = rows.map((row) => template.completion(textFields(row, template)).trim());
  const classes = options.labels ?? classesOf(truths, options.data);
  const structured = !template.promptFields.includes(template.completionField);
  const tokenize: TokenizeOptions = {
    tokenizer,
    template,
    ...(config.overlong === 'truncate_prompt' ? { maxLength: config.max_length, overlong: config.overlong } : {}),
    ...(structured ? { labels: classes } : {}),
  };
  const { examples } = await tokenizeRows(context, rows, tokenize, 'rows');
  // Rows that are one text have no field for the check above.
  const strange = truths.flatMap((truth, index) => (classes.includes(truth) ? [] : [{ index, truth }]));
  if (strange.length > 0) {
    throw new DataError(
      'the data has rows whose answer is none of the labels',
      strange.map(({ index, truth }) => ({
        index,
        where: rowName(rows[index], index),
        message: `unknown label ${quoted(truth, 60)}; the labels are ${printable(classes.join(', '))}`,
      })),
      'Mend these rows, or give all labels with --labels.',
    );
  }

  const penalty = read.files.generationConfig?.['repetition_penalty'];
  if (penalty !== undefined && penalty !== null && penalty !== 1) {
    ui.warn(
      `the model's generation_config.json has repetition_penalty: ${quoted(penalty)}; labels are answered without it, since it would count those that stand in the prompt as repeated`,
    );
  }
  const session = await openSession(context, options, { ...read, tokenizer });
  try {
    const began = performance.now();
    const pad = { padTokenId: tokenizer.padTokenId ?? tokenizer.eosTokenId ?? 0 };
    const lossBar = ui.progress('loss', { total: examples.length });
    const loss = await evaluateLoss(session.model, examples, {
      batchSize: options.batchSize,
      collate: pad,
      signal: context.signal,
      onProgress: (done) => lossBar.update(done),
    }).finally(() => lossBar.done());
    const scored = options.labels !== undefined && structured;
    if (options.labels !== undefined && !structured) {
      ui.note('rows that are one text are answered by free generation; --labels names the classes alone');
    }
    const answers = scored
      ? await scoreLabels(context, session.model, rows, tokenize, {
          labels: classes,
          batchSize: options.batchSize,
          pad,
        })
      : await generateAnswers(context, session, rows, tokenize, { labels: classes, truths, options, tokenizer });
    const metrics = classificationMetrics(
      truths,
      answers.map((answer) => answer.label),
      classes,
    );
    const seconds = (performance.now() - began) / 1000;
    const result = resultOf(options, session, metrics, { loss, scored, truths, seconds });
    if (options.output !== undefined) {
      await writeFileAtomic(join(options.output, 'predictions.jsonl'), predictionLines(rows, template, answers));
      await writeJsonAtomic(join(options.output, 'eval_results.json'), result);
      const { model } = session;
      const { signal } = context;
      await writeTokenLosses(
        options.output,
        { model, tokenizer, rows, examples, collate: pad, signal },
        options.tokenLosses,
      );
    }
    if (ui.json) ui.data(result);
    show(context, options, metrics, result);
  } finally {
    session.close();
  }
}

/** The run file whose template is used: the given one, else the adapter's, else none. */
async function templateConfig(
  context: CommandContext,
  options: EvalOptions,
  adapterFolder: string | undefined,
): Promise<Config> {
  if (options.config !== undefined) {
    const { config, notes } = await loadConfig(options.config);
    for (const note of notes) context.ui.note(note);
    return config;
  }
  const own = adapterFolder === undefined ? undefined : await readRunConfig(adapterFolder);
  return (own ?? resolveConfig({})).config;
}

/** Lets the model answer freely and reads the answers strictly: what is no label is invalid, never mapped to one. */
async function generateAnswers(
  context: CommandContext,
  session: Session,
  rows: readonly PlacedRow[],
  tokenize: TokenizeOptions,
  {
    labels,
    truths,
    options,
    tokenizer,
  }: {
    readonly labels: readonly string[];
    readonly truths: readonly string[];
    readonly options: EvalOptions;
    readonly tokenizer: Tokenizer;
  },
): Promise<Answer[]> {
  const { ui, signal } = context;
  const config = answerConfig(tokenize, tokenizer, options.maxNewTokens);
  const prompts = rows.map((row, index) => ({ index, ids: encodePrompt(row, tokenize, index).ids }));
  prompts.sort((a, b) => b.ids.length - a.ids.length || a.index - b.index);
  const answers: Answer[] = [];
  const counter = new ConfusionCounter(labels);
  const progress = ui.progress('answering', { total: rows.length });
  try {
    for (let from = 0; from < prompts.length; from += options.batchSize) {
      const batch = prompts.slice(from, from + options.batchSize);
      const given = await generate(
        session.model,
        batch.map(({ ids }) => ids),
        { config, tokenizer, signal },
      );
      for (const [i, { ids, text, finish }] of given.entries()) {
        // From the new ids alone, special tokens shown: an answer with one inside it is no answer.
        const said = finish === 'eos' ? ids.slice(0, -1) : ids;
        const answer = finish === 'stop' ? (text ?? '') : tokenizer.decode(said, { skipSpecialTokens: false });
        const label = matchLabel(answer, labels);
        answers[batch[i].index] = { text: answer, label };
        counter.add(truths[batch[i].index], label);
      }
      progress.update(from + batch.length, `accuracy ${counter.accuracy.toFixed(3)}`);
    }
    return answers;
  } finally {
    progress.done();
  }
}

/** Greedy, and ended by what ended the completions in training. */
function answerConfig(
  { template }: TokenizeOptions,
  tokenizer: Tokenizer,
  maxNewTokens: number,
): ResolvedGenerationConfig {
  const end = terminatorOf(template, tokenizer);
  const eos = [...new Set([end.id, tokenizer.eosTokenId].filter((id) => id !== undefined))];
  return resolveGenerationConfig(undefined, {
    do_sample: false,
    max_new_tokens: maxNewTokens,
    ...(eos.length > 0 ? { eos_token_id: eos } : {}),
    ...(end.kind === 'text' ? { stop_strings: end.text } : {}),
  }).config;
}

/** What `eval --json` prints and eval_results.json holds. */
interface EvalResult {
  readonly model: string;
  readonly adapter: string | null;
  readonly data: string;
  readonly rows: number;
  /** `labels`: each label was scored; `generate`: the model answered freely. */
  readonly mode: 'labels' | 'generate';
  readonly dtype: 'float32' | 'float16';
  readonly eval_loss: number;
  readonly eval_mean_token_accuracy: number;
  readonly accuracy: number;
  readonly macro_f1: number;
  readonly weighted_f1: number;
  readonly invalid: number;
  readonly invalid_share: number;
  /** Always answering the commonest class. */
  readonly majority: {
    readonly label: string;
    readonly accuracy: number;
    readonly macro_f1: number;
    readonly weighted_f1: number;
  };
  readonly classes: ClassificationMetrics['classes'];
  readonly labels: readonly string[];
  /** Rows: right class; columns: answered class, the last one invalid. */
  readonly confusion: ClassificationMetrics['confusion'];
  readonly seconds: number;
}

function resultOf(
  options: EvalOptions,
  session: Session,
  metrics: ClassificationMetrics,
  more: {
    readonly loss: { readonly loss: number; readonly tokenAccuracy: number };
    readonly scored: boolean;
    readonly truths: readonly string[];
    readonly seconds: number;
  },
): EvalResult {
  const { truths } = more;
  const commonest = metrics.classes.reduce((best, item) => (item.support > best.support ? item : best)).label;
  const baseline = classificationMetrics(
    truths,
    truths.map(() => commonest),
    metrics.labels,
  );
  return {
    model: options.model,
    adapter: options.adapter ?? null,
    data: options.data,
    rows: metrics.count,
    mode: more.scored ? 'labels' : 'generate',
    dtype: session.model.dtype === 'f32' ? 'float32' : 'float16',
    eval_loss: more.loss.loss,
    eval_mean_token_accuracy: more.loss.tokenAccuracy,
    accuracy: metrics.accuracy,
    macro_f1: metrics.macroF1,
    weighted_f1: metrics.weightedF1,
    invalid: metrics.invalid,
    invalid_share: metrics.invalidShare,
    majority: {
      label: commonest,
      accuracy: baseline.accuracy,
      macro_f1: baseline.macroF1,
      weighted_f1: baseline.weightedF1,
    },
    classes: metrics.classes,
    labels: metrics.labels,
    confusion: metrics.confusion,
    seconds: more.seconds,
  };
}

function predictionLines(rows: readonly PlacedRow[], template: PromptTemplate, answers: readonly Answer[]): string {
  return rows
    .map((row, i) => {
      const { text, label, probabilities } = answers[i];
      const { file, line } = row.source;
      const fields = textFields(row, template);
      return `${JSON.stringify({
        file,
        line,
        prompt: template.prompt(fields),
        label: template.completion(fields).trim(),
        prediction: label ?? null,
        answer: text,
        probabilities,
      })}\n`;
    })
    .join('');
}

function show(context: CommandContext, options: EvalOptions, metrics: ClassificationMetrics, result: EvalResult): void {
  const { ui } = context;
  const { dim } = ui.colors;
  const share = (value: number): string => `${(100 * value).toFixed(1)} %`;
  const score = (value: number): string => value.toFixed(3);
  ui.line(
    `${formatCount(result.rows)} rows, ${result.mode === 'labels' ? 'labels scored' : 'answered freely (greedy)'}; loss ${formatNumber(result.eval_loss, 4)}, ${share(result.eval_mean_token_accuracy)} of tokens right`,
  );
  ui.line();
  const { majority } = result;
  ui.table(
    [
      ['', 'accuracy', 'macro F1', 'weighted F1', 'invalid'].map(dim),
      [
        'this model',
        score(result.accuracy),
        score(result.macro_f1),
        score(result.weighted_f1),
        share(result.invalid_share),
      ],
      [
        `always ${printable(majority.label, 40)}`,
        score(majority.accuracy),
        score(majority.macro_f1),
        score(majority.weighted_f1),
        share(0),
      ],
    ],
    ['left', 'right', 'right', 'right', 'right'],
  );
  ui.line();
  ui.table(
    [
      ['class', 'rows', 'answered', 'precision', 'recall', 'F1'].map(dim),
      ...metrics.classes.map((item) => [
        printable(item.label, 40),
        formatCount(item.support),
        formatCount(item.predicted),
        score(item.precision),
        score(item.recall),
        score(item.f1),
      ]),
    ],
    ['left', 'right', 'right', 'right', 'right', 'right'],
  );
  ui.line();
  ui.table(
    [
      ['right \\ answered', ...metrics.labels.map((label) => printable(label, 40)), 'invalid'].map(dim),
      ...metrics.confusion.map((counts, i) => [printable(metrics.labels[i], 40), ...counts.map(formatCount)]),
    ],
    ['left', ...metrics.labels.map(() => 'right' as const), 'right'],
  );
  if (options.output !== undefined) {
    ui.line();
    ui.line(`eval_results.json and predictions.jsonl are in ${printable(options.output)}`);
    ui.line(`look at them with: lorikeet dashboard ${shellQuoted(options.output)}`);
  }
}
