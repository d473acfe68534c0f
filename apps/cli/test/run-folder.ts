/** A run's folder as a run leaves it, with hostile texts in all that comes from data. */
import { spawnSync } from 'node:child_process';
import { appendFile, mkdir, writeFile } from 'node:fs/promises';
import { createRequire } from 'node:module';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import type { Overview } from '../page/types.js';
import type { EvalEntry, LogEntry } from '../src/reporting/reporter.js';

/** What must stay text: markup, the end of a script, characters that end a line of JavaScript. */
export const hostile =
  '<img src=x onerror="document.title=\'broken\'"></script><script>document.title="broken"</script>\u2028';

/** Compiles a part that is used as it is in dist. */
export function build(part: 'page' | 'wandb-child'): void {
  const tsc = createRequire(import.meta.url).resolve('typescript/bin/tsc');
  const project = fileURLToPath(new URL(`../${part}`, import.meta.url));
  const { status, stdout } = spawnSync(process.execPath, [tsc, '-b', project], { encoding: 'utf8' });
  if (status !== 0) throw new Error(stdout);
}

/** The line of a step; that of step 3 has no loss. */
export const logEntry = (step: number): LogEntry => ({
  step,
  epoch: step / 10,
  loss: step === 3 ? Number.NaN : 1 / step,
  mean_token_accuracy: 0.5,
  grad_norm: 2,
  learning_rate: 1e-4,
  num_tokens: 100 * step,
  tokens_per_second: 50,
  peak_memory_bytes: 6_123_456_789,
  loss_scale: 65536,
  skipped_steps: 1,
  seconds: 2 * step,
});

/** The line of an evaluation. */
export const evalEntry = (step: number): EvalEntry => ({
  step,
  epoch: 1,
  eval_loss: 3,
  eval_mean_token_accuracy: 0.25,
});

/** Lines of a log: a falling loss, an evaluation every 10 steps. */
export function logLines(from: number, to: number, loss = 2): string {
  const lines: unknown[] = [];
  for (let step = from; step <= to; step++) {
    const wave = 0.2 * Math.sin(step * 1.7);
    lines.push({
      step,
      epoch: step / 50,
      loss: loss * Math.exp(-step / 40) + 0.3 + wave * Math.exp(-step / 80),
      mean_token_accuracy: 1 - 0.7 * Math.exp(-step / 30),
      grad_norm: step === 5 ? Number.NaN : 1 + wave,
      learning_rate: 1e-4 * (1 - step / 200),
      num_tokens: 512 * step,
      tokens_per_second: 900 + 100 * wave,
      peak_memory_bytes: 6.1e9,
      loss_scale: 1,
      skipped_steps: step >= 5 ? 1 : 0,
      seconds: 3.5 * step,
    });
    if (step % 10 === 0) {
      const share = 1 - 0.6 * Math.exp(-step / 30);
      lines.push({
        step,
        epoch: step / 50,
        eval_loss: loss * Math.exp(-step / 40) + 0.4,
        eval_mean_token_accuracy: share,
      });
    }
  }
  return lines.map((line) => `${JSON.stringify(line)}\n`).join('');
}

const overview = (name: string): Overview => ({
  name,
  started: '2026-01-02T03:04:05.000Z',
  total_steps: 200,
  facts: [
    ['model', `base-model${hostile}, 7,241,732,096 parameters, float16`],
    ['adapter', 'LoRA r 16, alpha 32 on q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj'],
    ['trainable', '41,943,040 parameters, 0.579 % of all'],
    ['device', 'some device'],
    ['memory', '6.1 GB planned at the peak: weights 4.2 GB, activations 1.4 GB, optimizer 336 MB, adapter 168 MB'],
  ],
  settings: `learning_rate: 0.0001\nlora:\n  r: 16\n# ${hostile}\n`,
  rows: [
    {
      where: 'train.jsonl:1',
      segments: [
        { text: '<s>', kind: 'special', end: false },
        { text: 'dropped ', kind: 'truncated', end: false },
        {
          text: `Instruction: What is the sentiment?\nInput: Sales rose ${hostile}\nAnswer: `,
          kind: 'masked',
          end: false,
        },
        { text: 'positive', kind: 'trained', end: false },
        { text: '</s>', kind: 'trained', end: true },
      ],
      trained: 2,
      tokens: 40,
      problem: null,
    },
    { where: 'train.jsonl:2', segments: [], trained: 0, tokens: 0, problem: `field "${hostile}" is missing` },
  ],
});

/** Writes the folder of a run that stands at step 60, with 130 predictions of which every fifth is wrong. */
export async function writeRunFolder(folder: string, name: string, loss?: number): Promise<void> {
  await mkdir(folder, { recursive: true });
  const file = (path: string, value: unknown): Promise<void> => writeFile(join(folder, path), JSON.stringify(value));
  await writeFile(join(folder, 'train_log.jsonl'), logLines(1, 60, loss));
  await file('overview.json', overview(name));
  await file('eval_results.json', { eval_loss: 0.41, accuracy: 0.8, majority: { label: hostile, accuracy: 0.6 } });
  await file('token_losses.json', [
    {
      where: 'test.jsonl:1',
      tokens: [
        ['<s>', null],
        [`Sales fell ${hostile} `, null],
        ['neg', 3.2],
        ['ative', 0.05],
        ['</s>', 0.6],
      ],
    },
  ]);
  const labels = ['positive', 'negative', `odd ${hostile}`];
  const predictions = Array.from({ length: 130 }, (_, i) => ({
    file: 'test.jsonl',
    line: i + 1,
    prompt: `Instruction: What is the sentiment of this news?\nInput: headline ${i} ${i === 7 ? 'zebra ' : ''}${hostile}\nAnswer: `,
    label: labels[i % 3],
    prediction: i % 5 === 0 ? null : labels[i % 3],
    answer: i % 5 === 0 ? `nonsense ${hostile}` : labels[i % 3],
  }));
  await writeFile(join(folder, 'predictions.jsonl'), predictions.map((row) => `${JSON.stringify(row)}\n`).join(''));
}

/** The run goes on for some steps. */
export async function goOn(folder: string, from: number, to: number): Promise<void> {
  await appendFile(join(folder, 'train_log.jsonl'), logLines(from, to));
}
