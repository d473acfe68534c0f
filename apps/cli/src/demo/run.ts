/**
 * `npm run demo`: the commands of the command line, one after the other, on headlines of our own grammar and the base
 * model in this repository. It needs no network.
 */
import { readFile, rm } from 'node:fs/promises';
import { join, relative } from 'node:path';
import { fileURLToPath } from 'node:url';
import { classificationMetrics } from '@lorikeet/trainer';
import { z } from 'zod';
import { runEval } from '../commands/eval.js';
import { runMerge } from '../commands/merge.js';
import { runTrain } from '../commands/train.js';
import type { CommandContext } from '../context.js';
import { CliError } from '../errors.js';
import { formatDuration } from '../text.js';
import { Ui } from '../ui.js';
import { writeFileAtomic } from '../write.js';
import { majorityClass, trainBagOfWords } from './bag-of-words.js';
import { demoHeadlines, type Headline } from './headlines.js';

/** The base model of this repository. */
const demoModel = fileURLToPath(new URL('../../../../models/base', import.meta.url));

/** What the rows of the demo ask, in FinGPT's form. */
const instruction = 'What is the sentiment of this news? Please choose an answer from {negative/neutral/positive}.';

const predictionSchema = z.object({ prediction: z.string().nullable(), answer: z.string() });

/** What the model said of a row; null stands for what is no label. */
type Prediction = z.infer<typeof predictionSchema>;

/** Settings of {@link runDemo}. */
export interface DemoOptions {
  /** Folder for everything that is written; what is in it is replaced. */
  readonly output: string;
  readonly model?: string;
  /** Headlines to train on, and of each of the two tests. */
  readonly sizes?: { readonly train: number; readonly test: number };
  readonly epochs?: number;
  /** Seed of the headlines; default 1. */
  readonly seed?: number;
}

/** The accuracies that the demo shows at its end. */
export interface DemoResult {
  readonly name: string;
  readonly before: number;
  readonly after: number;
  readonly majority: number;
  readonly bagOfWords: number;
}

/** The run file of the demo. */
function runFile(model: string, output: string, epochs: number): string {
  return `# The run of the demo. Every key is explained by \`lorikeet train --help\` and in docs/guide.
model_name_or_path: ${JSON.stringify(model)}
train_file: ${JSON.stringify(join(output, 'train.jsonl'))}
validation_split: 0
max_length: 128
lora: { r: 16, lora_alpha: 32, target_modules: all-linear }
per_device_train_batch_size: 16
num_train_epochs: ${epochs}
learning_rate: 1e-3
lr_scheduler_type: cosine
warmup_ratio: 0.1
gradient_checkpointing: false
dtype: float32
logging_steps: 10
output_dir: ${JSON.stringify(join(output, 'adapter'))}
`;
}

const lines = (headlines: readonly Headline[]): string =>
  headlines.map(({ text, label }) => `${JSON.stringify({ instruction, input: text, output: label })}\n`).join('');

const percent = (share: number): string => `${(100 * share).toFixed(1)} %`;

/** Shows the whole path and gives the accuracies. */
export async function runDemo(context: CommandContext, options: DemoOptions): Promise<readonly DemoResult[]> {
  const { ui, io } = context;
  const {
    output,
    model = relative(process.cwd(), demoModel),
    sizes = { train: 1200, test: 240 },
    epochs = 2,
    seed = 1,
  } = options;
  const { bold, dim, green, red } = ui.colors;
  const began = performance.now();
  // The tables of single evaluations would hide the story; their progress stays.
  const quiet: CommandContext = { ...context, ui: new Ui({ ...io, stdout: { write: () => true } }) };
  const step = (text: string): void => {
    ui.line();
    ui.line(bold(text));
  };

  await rm(output, { recursive: true, force: true });
  const data = demoHeadlines(seed, { train: sizes.train, known: sizes.test, unseen: sizes.test });
  const file = (name: string): string => join(output, name);
  for (const part of ['train', 'known', 'unseen'] as const)
    await writeFileAtomic(file(`${part}.jsonl`), lines(data[part]));
  const config = file('run.yaml');
  await writeFileAtomic(config, runFile(model, output, epochs));

  ui.line(bold('Lorikeet: a small Mistral-architecture model learns financial sentiment through LoRA'));
  ui.line(
    dim(
      `The headlines are synthetic, written by a grammar of this repository: ${data.train.length} to train on, ${data.known.length} of the same templates with other companies and numbers, ${data.unseen.length} of templates, verbs and companies that training never sees.`,
    ),
  );

  const answers = async (
    name: 'known' | 'unseen',
    as: string,
    more: { model: string; adapter?: string },
  ): Promise<Prediction[]> => {
    await runEval(quiet, {
      ...more,
      data: file(`${name}.jsonl`),
      output: file(`${as}-${name}`),
      config,
      batchSize: 32,
      maxNewTokens: 4,
      dtype: 'float32',
    });
    const text = await readFile(join(file(`${as}-${name}`), 'predictions.jsonl'), 'utf8');
    return text
      .trimEnd()
      .split('\n')
      .map((line) => predictionSchema.parse(JSON.parse(line)));
  };
  const parts = ['known', 'unseen'] as const;

  step('1. Before: the base model answers');
  const before = {
    known: await answers('known', 'before', { model }),
    unseen: await answers('unseen', 'before', { model }),
  };
  for (const part of parts) ui.line(`${part} templates: ${percent(accuracy(data[part], before[part]))} right`);

  step(`2. lorikeet train -c ${config}`);
  await runTrain(context, [], { config });
  context.signal.throwIfAborted();

  const adapter = file('adapter');
  step(`3. After: lorikeet eval --model ${model} --adapter ${adapter} --data ...`);
  const after = {
    known: await answers('known', 'after', { model, adapter }),
    unseen: await answers('unseen', 'after', { model, adapter }),
  };
  const bag = trainBagOfWords(
    data.train.map(({ text }) => text),
    data.train.map(({ label }) => label),
  );
  const majority = majorityClass(data.train.map(({ label }) => label));
  const results = parts.map((part): DemoResult => {
    const rows = data[part];
    const share = (say: (row: Headline) => string): number =>
      rows.filter((row) => say(row) === row.label).length / rows.length;
    return {
      name: part,
      before: accuracy(rows, before[part]),
      after: accuracy(rows, after[part]),
      majority: share(() => majority),
      bagOfWords: share(({ text }) => bag.predict(text)),
    };
  });
  ui.table(
    [
      ['accuracy', 'before', 'after', 'bag of words', `always ${majority}`].map(dim),
      ...results.map((row) => [
        row.name === 'known' ? 'known templates, new companies and numbers' : 'templates and verbs never seen',
        percent(row.before),
        bold(percent(row.after)),
        percent(row.bagOfWords),
        percent(row.majority),
      ]),
    ],
    ['left', 'right', 'right', 'right', 'right'],
  );
  ui.line();
  ui.line('some of the headlines never seen:');
  data.unseen.slice(0, 6).forEach(({ text, label }, i) => {
    const said = after.unseen[i]?.answer.trim() ?? '';
    ui.line(
      `  ${said === label ? green('right') : red('wrong')}  ${said.padEnd(9)} ${text}${said === label ? '' : dim(` (${label})`)}`,
    );
  });

  step('4. lorikeet merge: base and adapter as one model, written and read again');
  const merged = file('merged');
  await runMerge(context, { model, adapter, output: merged, verify: true, maxShardSize: 5, dtype: 'float32' });
  const again = await answers('unseen', 'merged', { model: merged });
  const equal = again.filter((row, i) => row.answer === after.unseen[i]?.answer).length;
  ui.line(`${equal} of ${again.length} answers of the reloaded merged model equal those of base and adapter`);
  if (equal < again.length) throw new CliError(`the merged model answers ${again.length - equal} headlines otherwise`);

  step(`Done in ${formatDuration((performance.now() - began) / 1000)}. Everything is in ${output}`);
  ui.line('The base model has about a million parameters and was made for this demo: a 7B is another matter.');
  ui.line('Your own data: docs/guide/first-fine-tune.md');
  return results;
}

function accuracy(rows: readonly Headline[], predictions: readonly Prediction[]): number {
  return classificationMetrics(
    rows.map(({ label }) => label),
    predictions.map(({ prediction }) => prediction ?? undefined),
    ['negative', 'neutral', 'positive'],
  ).accuracy;
}
