// The table of docs/methods.md: every PEFT method on the small base, with the same rows, steps and batch.
//
//   node scripts/method-table.mjs TRAIN.jsonl TEST.jsonl [--steps 270] [--limit ROWS] [--methods lora,ia3] [--fresh] [--times STEPS] [--write]
//
// The files have rows of instruction, input and output, as FinGPT's sets have them. Runs lie in out/methods; what is there
// already, of the same steps and files, is not done again unless --fresh. --times takes the time of a step from short runs of
// that many steps, one after the other: for a machine that had other work during the long ones. --write puts the table into
// docs/methods.md. Needs a build (`pnpm build`).
import { spawnSync } from 'node:child_process';
import { existsSync, mkdirSync, readFileSync, rmSync, statSync, writeFileSync } from 'node:fs';
import { cpus } from 'node:os';
import { basename, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';

const root = fileURLToPath(new URL('..', import.meta.url));
const out = join(root, 'out', 'methods');
const base = 'models/base';
const recipe = 'examples/sentiment-small-base.yaml';

/** @typedef {{ id: string, name: string, rate: number, keys: string[], loading?: string[] }} Method */
/**
 * @typedef {object} Row
 * @property {string} id
 * @property {string} name
 * @property {string} settings what has to be the same for the result to stand
 * @property {string} device
 * @property {number} trainable
 * @property {number} adapterBytes
 * @property {number} stateBytes
 * @property {number} stepMs
 * @property {number} f1
 * @property {number} invalid
 */

const all = 'target_modules=all-linear';
const lowRank = ['lora.r=16', 'lora.lora_alpha=32', 'lora.lora_dropout=0', `lora.${all}`];
/** Rates: a model of a million parameters wants ten times and more of what the methods' papers give for large ones. */
/** @type {Method[]} */
const methods = [
  { id: 'lora', name: 'LoRA, r 16', rate: 2e-3, keys: lowRank },
  { id: 'rslora', name: 'rsLoRA, r 16', rate: 1e-3, keys: [...lowRank, 'lora.use_rslora=true'] },
  { id: 'dora', name: 'DoRA, r 16', rate: 2e-3, keys: [...lowRank, 'lora.use_dora=true'] },
  { id: 'pissa', name: 'PiSSA, r 16', rate: 1e-3, keys: [...lowRank, 'lora.init_lora_weights=pissa'] },
  { id: 'olora', name: 'OLoRA, r 16', rate: 1e-3, keys: [...lowRank, 'lora.init_lora_weights=olora'] },
  { id: 'orthogonal', name: 'orthogonal, r 16', rate: 1e-3, keys: [...lowRank, 'lora.init_lora_weights=orthogonal'] },
  { id: 'eva', name: 'EVA, r 16', rate: 1e-3, keys: [...lowRank, 'lora.init_lora_weights=eva'] },
  {
    id: 'loftq',
    name: 'LoftQ over NF4, r 16',
    rate: 2e-3,
    keys: [...lowRank, 'lora.init_lora_weights=loftq'],
    loading: ['--load-in-4bit'],
  },
  { id: 'ia3', name: '(IA)^3', rate: 2e-2, keys: ['lora=', 'ia3={}'] },
  { id: 'norms', name: 'norm tuning', rate: 2e-2, keys: ['lora=', 'ln_tuning={}'] },
  { id: 'houlsby', name: 'Houlsby', rate: 2e-3, keys: ['lora=', 'bottleneck.kind=houlsby'] },
  { id: 'pfeiffer', name: 'Pfeiffer', rate: 2e-3, keys: ['lora=', 'bottleneck.kind=pfeiffer'] },
  { id: 'parallel', name: 'parallel', rate: 2e-3, keys: ['lora=', 'bottleneck.kind=parallel'] },
  {
    id: 'prompt',
    name: 'prompt tuning, 20',
    rate: 3e-2,
    keys: ['lora=', 'prompt_tuning.num_virtual_tokens=20', 'prompt_tuning.prompt_tuning_init=SAMPLE_VOCAB'],
  },
  { id: 'prefix', name: 'prefix tuning, 20', rate: 3e-2, keys: ['lora=', 'prefix_tuning.num_virtual_tokens=20'] },
];

const { values: flags, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    steps: { type: 'string', default: '270' },
    limit: { type: 'string' },
    methods: { type: 'string' },
    times: { type: 'string' },
    fresh: { type: 'boolean', default: false },
    write: { type: 'boolean', default: false },
  },
});
const [trainFile, testFile] = positionals;
const wanted = flags.methods?.split(',') ?? methods.map(({ id }) => id);
const unknown = wanted.filter((id) => !methods.some((method) => method.id === id));
if (trainFile === undefined || testFile === undefined || positionals.length > 2 || unknown.length > 0) {
  console.error(
    unknown.length > 0
      ? `there is no method ${unknown.join(', ')}; there is ${methods.map(({ id }) => id).join(', ')}`
      : 'usage: node scripts/method-table.mjs TRAIN.jsonl TEST.jsonl [--steps 270] [--limit ROWS] [--methods a,b] [--fresh] [--times STEPS] [--write]',
  );
  process.exit(2);
}
const page = join(root, 'docs', 'methods.md');
const marks = ['<!-- the table, by scripts/method-table.mjs -->', '<!-- end of the table -->'];
const batch = 16;

mkdirSync(out, { recursive: true });
const rows = [measured('base', 'the base, not trained', undefined)];
for (const method of methods) {
  if (wanted.includes(method.id)) rows.push(measured(method.id, method.name, method));
}
if (flags.times !== undefined) {
  for (const row of rows) {
    const method = methods.find(({ id }) => id === row.id);
    if (method !== undefined) row.stepMs = train(join(out, 'times'), method, flags.times).stepMs;
  }
}
const table = markdown(rows);
console.log(`\n${table}`);
if (flags.write) {
  const text = readFileSync(page, 'utf8');
  const [from, to] = marks.map((mark) => text.indexOf(mark));
  if (from === -1 || to < from) throw new Error(`${page} has no ${marks.join(' and ')}`);
  writeFileSync(page, `${text.slice(0, from + marks[0].length)}\n\n${table}\n${text.slice(to)}`);
  console.log(`written: ${page}`);
}

/**
 * A row of the table, from an earlier run of the same settings where there is one.
 * @param {string} id
 * @param {string} name
 * @param {Method | undefined} method
 * @returns {Row}
 */
function measured(id, name, method) {
  const folder = join(out, id);
  const known = join(out, `${id}.json`);
  const settings = JSON.stringify([method, flags.steps, flags.limit, ...[trainFile, testFile].map(sizeOf)]);
  if (!flags.fresh && existsSync(known)) {
    const row = JSON.parse(readFileSync(known, 'utf8'));
    if (row.settings === settings) return row;
  }
  console.log(`\n== ${name}`);
  const trained = method === undefined ? untrained() : train(folder, method, flags.steps);
  const { weighted_f1: f1, invalid_share: invalid } = evaluate(
    method === undefined ? undefined : folder,
    method?.loading,
  );
  /** @type {Row} */
  const row = { id, name, settings, ...trained, f1, invalid };
  writeFileSync(known, `${JSON.stringify(row)}\n`);
  console.log(`weighted F1 ${f1.toFixed(3)}, invalid ${(100 * invalid).toFixed(1)} %`);
  return row;
}

function untrained() {
  return { device: '', trainable: 0, adapterBytes: 0, stateBytes: 0, stepMs: 0 };
}

/**
 * @param {string} folder
 * @param {Method} method
 * @param {string} steps
 */
function train(folder, { rate, keys }, steps) {
  rmSync(folder, { recursive: true, force: true });
  lorikeet([
    'train',
    '-c',
    recipe,
    ...keys,
    `train_file=${trainFile}`,
    'validation_split=0',
    `per_device_train_batch_size=${batch}`,
    `max_steps=${steps}`,
    `learning_rate=${rate}`,
    'logging_steps=1',
    `save_steps=${steps}`,
    `output_dir=${folder}`,
    '--json',
  ]);
  const run = JSON.parse(readFileSync(join(folder, 'run.json'), 'utf8'));
  const log = readFileSync(join(folder, 'train_log.jsonl'), 'utf8').trim().split('\n');
  const seconds = log.map((/** @type {string} */ line) => Number(JSON.parse(line).seconds));
  // The first step makes kernels and tables that the others find.
  const times = seconds.slice(1).map((/** @type {number} */ now, /** @type {number} */ i) => now - seconds[i]);
  const checkpoint = join(folder, `checkpoint-${steps}`);
  const file = ['adapter_model.safetensors', 'adapter.safetensors'].find((name) => existsSync(join(folder, name)));
  return {
    device: `${run.device.description}`,
    trainable: Number(run.trainable_parameters),
    adapterBytes: sizeOf(join(folder, `${file}`)),
    stateBytes: sizeOf(join(checkpoint, 'optimizer.safetensors')),
    stepMs: 1000 * median(times),
  };
}

/**
 * @param {string | undefined} folder of the adapter
 * @param {string[]} loading options that say how the base is stored
 * @returns {{ weighted_f1: number, invalid_share: number }}
 */
function evaluate(folder, loading = []) {
  const limit = flags.limit === undefined ? [] : ['--limit', flags.limit];
  // Free answers: what is no label is invalid. The base has no run of its own, whose template would be taken.
  const which = folder === undefined ? ['-c', recipe] : ['--adapter', folder];
  return JSON.parse(
    lorikeet([
      'eval',
      '--model',
      base,
      ...which,
      '--data',
      testFile,
      '--batch-size',
      '32',
      ...loading,
      ...limit,
      '--json',
    ]),
  );
}

/** The standard output of the command line. */
function lorikeet(/** @type {string[]} */ args) {
  const { status, stdout } = spawnSync(process.execPath, [join(root, 'apps/cli/dist/main.js'), ...args], {
    cwd: root,
    encoding: 'utf8',
    maxBuffer: 1 << 28,
    stdio: ['ignore', 'pipe', 'inherit'],
  });
  if (status !== 0) throw new Error(`lorikeet ${args.join(' ')} ended with ${status}`);
  return stdout;
}

function sizeOf(/** @type {string} */ path) {
  return statSync(path).size;
}

function median(/** @type {number[]} */ values) {
  const sorted = values.toSorted((a, b) => a - b);
  return sorted[Math.floor(sorted.length / 2)] ?? 0;
}

/** The table as Markdown. */
function markdown(/** @type {Row[]} */ found) {
  const count = (/** @type {number} */ n) => n.toLocaleString('en-US');
  const device = found.map((row) => row.device).find((name) => name !== '') ?? 'unknown';
  const { version } = JSON.parse(readFileSync(join(root, 'package.json'), 'utf8'));
  const lines = found.map(({ id, name, trainable, adapterBytes, stateBytes, stepMs, f1, invalid }) => {
    const rate = methods.find((method) => method.id === id)?.rate;
    const trained = [trainable, adapterBytes, stateBytes].map(count);
    const cells =
      rate === undefined ? ['', '', '', '', ''] : [rate.toExponential(), ...trained, `${stepMs.toFixed(0)} ms`];
    return `| ${[name, ...cells, f1.toFixed(3), `${(100 * invalid).toFixed(1)} %`].join(' | ')} |`;
  });
  const tested = flags.limit === undefined ? '' : `, the first ${flags.limit} rows`;
  return [
    `\`${base}\` on \`${basename(trainFile)}\`: ${flags.steps} steps of ${batch} rows, cosine, one run each; measured on \`${basename(testFile)}\`${tested} by free`,
    `answers. Lorikeet ${version}, ${new Date().toISOString().slice(0, 10)}, ${device} (${cpus()[0]?.model.trim() ?? 'unknown'}, ${cpus().length} threads); a step is the median of ${flags.times ?? 'all'}.`,
    '',
    '| method | learning rate | trained parameters | adapter file, bytes | optimizer state, bytes | a step | weighted F1 | invalid |',
    '|---|---|---|---|---|---|---|---|',
    ...lines,
    '',
  ].join('\n');
}
