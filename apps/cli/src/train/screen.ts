/** What a run shows of itself: its head, its lines, its end. */
import { basename, join, resolve } from 'node:path';
import type { Mistral } from '@lorikeet/mistral';
import type { Adapter } from '@lorikeet/peft';
import { itemAt, previewRow, type StepRecord } from '@lorikeet/trainer';
import type { Overview } from '../../page/types.js';
import { mixtureText } from '../data-mixture.js';
import { dumpConfig } from '../config.js';
import { runAdapter } from '../config-adapter.js';
import { previewLegend, renderPreview } from '../mask-preview.js';
import { formatFlops, partsInWords, planJson } from '../plan-report.js';
import { inFourBits } from '../plan-settings.js';
import { previewRows } from '../reporting/overview.js';
import type { LogEntry } from '../reporting/reporter.js';
import { packedRows, packingText } from '../run-data.js';
import { deviceName } from '../session.js';
import { formatBytes, formatCount, formatDuration, formatNumber, printable, quoted, shellQuoted } from '../text.js';
import type { Ui } from '../ui.js';
import { dtypeName, type Evaluation, type Progressed, type RunFrame } from './frame.js';

/** A model with what is trained of it. */
interface Trained {
  readonly model: Mistral;
  readonly adapter: Adapter;
}

/** What the run is, for its head and its overview. */
export function runFacts(frame: RunFrame, { model, adapter }: Trained, warmup: number): Overview['facts'] {
  const { config } = frame;
  const { trainable, total, percent } = adapter.trainableReport();
  const { train: trained, validation, added } = frame.data;
  const targets = [...new Set([...adapter.layers.keys()].map((path) => path.split('.').at(-1) ?? path))];
  const perStep = `${config.per_device_train_batch_size} x ${config.gradient_accumulation_steps}`;
  const texts = printable(added.map((token) => token.content).join(' '));
  const newTokens: Overview['facts'] = added.length === 0 ? [] : [['new tokens', `${texts} (their rows are trained)`]];
  return [
    [
      'model',
      `${printable(frame.files.name)}, ${formatCount(total - trainable)} parameters, ${dtypeName(model)}${inFourBits(config, frame.files) ? ', linear layers in 4 bits' : ''}`,
    ],
    ['adapter', `${runAdapter(config).words} on ${printable(targets.join(', '))}`],
    ['trainable', `${formatCount(trainable)} parameters, ${percent.toPrecision(3)} % of all`],
    ...newTokens,
    ['device', deviceName(frame.device)],
    [
      'data',
      `${formatCount(trained.report.kept)} rows of at most ${formatCount(trained.report.longest)} tokens, ${((100 * trained.report.supervised) / trained.report.tokens).toFixed(1)} % of them trained; ${formatCount(validation?.report.kept ?? 0)} rows held out`,
    ],
    ...mixture(frame),
    ...(config.packing ? [packing(frame)] : []),
    [
      'run',
      `${formatCount(frame.total)} steps of ${perStep} ${config.packing ? 'sequences' : 'rows'}, learning rate ${formatNumber(config.learning_rate)} ${config.lr_scheduler_type}, warm-up ${formatCount(warmup)}`,
    ],
    ['memory', `${formatBytes(frame.plan.peakBytes)} planned at the peak: ${partsInWords(frame.plan.parts)}`],
    ['a step', `${formatFlops(frame.plan.step.flops)} in ${formatCount(frame.plan.step.dispatches)} dispatches`],
  ];
}

function mixture({ data }: RunFrame): Overview['facts'] {
  const { mixture: sets } = data.rows;
  return sets === undefined ? [] : [['mixture', mixtureText(sets)]];
}

function packing({ data, config }: RunFrame): [name: string, value: string] {
  return ['packing', packingText(packedRows(data.train.report, data.sequences.length, config.max_length))];
}

/** What overview.json says of a run. */
export function overviewOf(frame: RunFrame, facts: Overview['facts']): Overview {
  const { config } = frame;
  const { rows, options } = frame.data;
  return {
    name: config.run_name ?? basename(resolve(config.output_dir)),
    started: frame.started,
    total_steps: frame.total,
    facts,
    settings: dumpConfig(config),
    rows: previewRows(rows.train, options),
  };
}

/** Shows what is about to run, and its first row. */
export function showHeader(frame: RunFrame, { model, adapter }: Trained, facts: Overview['facts']): void {
  const { config } = frame;
  const { ui } = frame.context;
  const { trainable, total, percent } = adapter.trainableReport();
  const { train: trained, validation, rows, options } = frame.data;
  const { info } = frame.device;
  if (ui.json) {
    ui.data({
      event: 'start',
      model: frame.files.name,
      parameters: total - trainable,
      trainable,
      trainable_percent: percent,
      method: runAdapter(config).section,
      dtype: dtypeName(model),
      load_in_4bit: inFourBits(config, frame.files),
      device: info,
      train_rows: trained.report.kept,
      train_sequences: frame.data.sequences.length,
      validation_rows: validation?.report.kept ?? 0,
      total_steps: frame.total,
      output_dir: config.output_dir,
      plan: planJson(frame.plan),
    });
  }
  ui.table(facts.map(([name, value]) => [ui.colors.dim(name), value]));
  ui.line();
  ui.line(`first row: ${previewLegend(ui)}`);
  ui.line(renderPreview(ui, previewRow(itemAt(rows.train, 0), options)));
  ui.line();
}

/** Shows an evaluation. */
export function showEvaluation(ui: Ui, when: string, { loss, tokenAccuracy }: Evaluation): void {
  ui.line(
    `held-out rows ${when}: loss ${formatNumber(loss, 4)}, ${(100 * tokenAccuracy).toFixed(1)} % of tokens right`,
  );
}

/** Shows how a run ended, and what can be done with what it made. */
export function showEnd(
  frame: RunFrame,
  last: Progressed,
  { before, after }: { before: Evaluation | undefined; after: Evaluation | undefined },
): void {
  const { config } = frame;
  const { ui, signal } = frame.context;
  const stopped = signal.aborted;
  if (ui.json) {
    ui.data({
      event: stopped ? 'interrupted' : 'done',
      step: last.step,
      output_dir: config.output_dir,
      eval_loss_before: before?.loss ?? null,
      eval_loss: after?.loss ?? null,
      skipped_steps: last.skippedSteps,
      peak_memory_bytes: last.peakBytes,
      seconds: last.seconds,
    });
  }
  const { bold, dim } = ui.colors;
  if (after !== undefined && !stopped) {
    ui.line();
    ui.table(
      [
        ['held-out rows', 'loss', 'tokens right'].map(dim),
        ...[
          { name: 'before', value: before },
          { name: 'after', value: after },
        ].flatMap(({ name, value }) =>
          value === undefined
            ? []
            : [[name, formatNumber(value.loss, 4), `${(100 * value.tokenAccuracy).toFixed(1)} %`]],
        ),
      ],
      ['left', 'right', 'right'],
    );
  }
  ui.line();
  ui.line(`adapter saved in ${bold(printable(config.output_dir))} (${formatDuration(last.seconds)} of training)`);
  if (stopped) return;
  const base = `--model ${shellQuoted(frame.files.name)}${config.revision === null ? '' : ` --revision ${shellQuoted(config.revision)}`}`;
  const loftq = config.lora?.init_lora_weights === 'loftq';
  const { merges } = runAdapter(config);
  const loaded = `${base}${config.load_in_4bit || loftq ? ' --load-in-4bit' : ''}`;
  const out = shellQuoted(config.output_dir);
  const test = shellQuoted([config.validation_file ?? 'test.jsonl'].flat()[0]);
  const { template, rows } = frame.data;
  const prompt = (): string => template.prompt(firstFields(itemAt(rows.train, 0).fields)).slice(0, 400);
  ui.line('try next:');
  for (const line of [
    // Rows that must be prepared are conversations.
    ...(template.prepare === undefined
      ? [
          `lorikeet eval ${loaded} -c ${shellQuoted(join(config.output_dir, 'run.yaml'))} --data ${test}    # before`,
          `lorikeet eval ${loaded} --adapter ${out} --data ${test}    # after`,
          `lorikeet generate ${loaded} --adapter ${out} --temperature 0 --prompt ${shellQuoted(prompt())}`,
        ]
      : [`lorikeet chat ${loaded} --adapter ${out}`]),
    // An adapter of LoftQ makes up for what the base loses in 4 bits: merged into what has lost nothing, that is an error.
    ...(loftq || !merges
      ? []
      : [
          `lorikeet merge ${base} --adapter ${out} --output ${shellQuoted(`${config.output_dir.replace(/[\\/]+$/, '')}-merged`)} --verify`,
        ]),
    `lorikeet inspect ${out}`,
    `lorikeet dashboard ${out}`,
  ]) {
    ui.line(`  ${line}`);
  }
}

/** The texts of a row's fields. */
function firstFields(fields: Readonly<Record<string, unknown>>): Record<string, string> {
  return Object.fromEntries(
    Object.entries(fields).map(([name, value]) => [name, typeof value === 'string' ? value : quoted(value)]),
  );
}

/** The line of a step. */
export function stepLine(record: StepRecord, entry: LogEntry): string {
  const eta = (record.seconds / record.step) * (record.totalSteps - record.step);
  return [
    `step ${record.step}/${record.totalSteps}`,
    `loss ${formatNumber(entry.loss)}`,
    `acc ${(100 * entry.mean_token_accuracy).toFixed(1)}%`,
    `gnorm ${formatNumber(entry.grad_norm)}`,
    `lr ${formatNumber(entry.learning_rate)}`,
    `${formatCount(entry.tokens_per_second)} tok/s`,
    `peak ${formatBytes(entry.peak_memory_bytes)}`,
    ...(entry.skipped_steps > 0 ? [`skipped ${entry.skipped_steps}`] : []),
    `eta ${formatDuration(eta)}`,
  ].join('  ');
}
