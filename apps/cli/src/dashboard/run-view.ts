/** What a run's folder holds for the dashboard and the report; files of another shape are named and left out. */
import { basename, join, resolve } from 'node:path';
import { z } from 'zod';
import type { Overview, Prediction, RunView, TokenLossRow } from '../../page/types.js';
import { errorMessage } from '../errors.js';
import { overviewFile, tokenLossFile } from '../reporting/overview.js';
import { openOwn } from './run-log.js';

/** Rows of predictions that are shown, and the longest of their texts. */
const shownPredictions = 2000;
const longestText = 2000;
/** Larger files are not shown. */
const mostBytes = 256 << 20;

const overviewSchema: z.ZodType<Overview> = z.object({
  name: z.string(),
  started: z.string(),
  total_steps: z.number(),
  facts: z.array(z.tuple([z.string(), z.string()])),
  settings: z.string(),
  rows: z.array(
    z.object({
      where: z.string(),
      segments: z.array(
        z.object({
          text: z.string(),
          kind: z.enum(['special', 'truncated', 'masked', 'trained']),
          end: z.boolean(),
        }),
      ),
      trained: z.number(),
      tokens: z.number(),
      problem: z.string().nullable(),
    }),
  ),
});

const tokenLossSchema: z.ZodType<TokenLossRow[]> = z.array(
  z.object({ where: z.string(), tokens: z.array(z.tuple([z.string(), z.number().nullable()])) }),
);

const shortText = (): z.ZodType<string> => z.string().transform((text) => text.slice(0, longestText));
const predictionSchema: z.ZodType<Prediction> = z
  .object({
    file: z.string(),
    line: z.number(),
    // Absent from files of earlier versions.
    prompt: shortText().default(''),
    label: shortText(),
    prediction: shortText().nullable(),
    answer: shortText(),
  })
  .transform(({ file, line, ...rest }) => ({ where: `${file}:${line}`, ...rest }));

/** Numbers at any depth but in lists, by dotted name. */
function numbersIn(value: unknown, name = ''): [string, number][] {
  if (typeof value === 'number') return [[name, value]];
  if (typeof value !== 'object' || value === null || Array.isArray(value)) return [];
  return Object.entries(value).flatMap(([key, inner]) => numbersIn(inner, name === '' ? key : `${name}.${key}`));
}

/** Reads a run's folder, but for its log. */
export async function readRunView(folder: string): Promise<RunView> {
  const problems: string[] = [];
  /** Gives a file's text to `use`; what goes wrong with it is a problem of that file alone. */
  const read = async <T>(name: string, use: (text: string) => T, otherwise: T): Promise<T> => {
    try {
      const handle = await openOwn(join(folder, name));
      if (handle === undefined) return otherwise;
      try {
        const { size } = await handle.stat();
        if (size > mostBytes) throw new Error(`it has ${size} bytes, more than the ${mostBytes} that are shown`);
        return use(await handle.readFile('utf8'));
      } finally {
        await handle.close();
      }
    } catch (error) {
      const why = error instanceof z.ZodError ? 'it has another shape' : errorMessage(error);
      problems.push(`${name} is not shown: ${why}`);
      return otherwise;
    }
  };
  const status = await read(
    'run.json',
    (text) => z.object({ status: z.string() }).parse(JSON.parse(text)).status,
    null,
  );
  const overview = await read(overviewFile, (text) => overviewSchema.parse(JSON.parse(text)), null);
  const results = await read('eval_results.json', (text) => numbersIn(JSON.parse(text)), []);
  const predictions = await read(
    'predictions.jsonl',
    (text) => {
      const lines = text.split('\n').filter((line) => line !== '');
      const rows = lines.slice(0, shownPredictions).map((line) => predictionSchema.parse(JSON.parse(line)));
      return { total: lines.length, rows };
    },
    { total: 0, rows: [] },
  );
  const tokenLosses = await read(tokenLossFile, (text) => tokenLossSchema.parse(JSON.parse(text)), []);
  return { folder: basename(resolve(folder)), status, overview, results, predictions, tokenLosses, problems };
}
