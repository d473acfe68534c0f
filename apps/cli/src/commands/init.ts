/** `lorikeet init`: a run file to begin with, and rows to try it on. */
import { readFile, stat } from 'node:fs/promises';
import { isAbsolute, join, relative, resolve, sep } from 'node:path';
import { parseJsonObject } from '@lorikeet/tensor';
import { answerFields, resolveTemplate } from '@lorikeet/trainer';
import { schemaFile } from '../config-json-schema.js';
import type { CommandContext } from '../context.js';
import { readDataFile } from '../data-files.js';
import { demoHeadlines, type Headline } from '../demo/headlines.js';
import { CliError, errorMessage } from '../errors.js';
import { starterConfig } from '../starter-config.js';
import { printable, shellQuoted } from '../text.js';
import { writeFileAtomic } from '../write.js';

/** Options of the command. */
export interface InitOptions {
  readonly model?: string;
  /** The user's rows; without them a sample is written. */
  readonly data?: string;
}

/** A model that a card of 8 GB trains in 4 bits. */
const usualModel = 'mistralai/Mistral-7B-v0.1';

/** What the columns of the data ask for. */
interface TemplateFound {
  readonly template?: string;
  /** What the user is to know or to do. */
  readonly note?: string;
  /** The user has to set prompt_template. */
  readonly missing: boolean;
}

/** Runs the command. Nothing that is there is changed. */
export async function runInit(context: CommandContext, folder: string, options: InitOptions): Promise<void> {
  const { ui } = context;
  const sample = options.data === undefined ? sampleFiles() : {};
  const found = options.data === undefined ? sampleTemplate : await templateFor(options.data);
  const config = starterConfig({
    model: options.model === undefined ? usualModel : await from(folder, options.model),
    fourBit: options.model === undefined,
    small: await isSmall(options.model),
    trainFile: options.data === undefined ? 'train.csv' : placeFrom(folder, options.data),
    promptTemplate: found.template,
    templateNote: found.note,
    schema: schemaPlace(folder),
  });
  const files = Object.entries({ 'run.yaml': config, ...sample });
  for (const [name] of files) {
    const path = join(folder, name);
    if (await exists(path)) {
      throw new CliError('it is there already, and init replaces nothing', {
        where: path,
        fix: 'Name another folder: lorikeet init FOLDER.',
      });
    }
  }
  for (const [name, text] of files) await writeFileAtomic(join(folder, name), text);

  const next = [
    ...(resolve(folder) === process.cwd() ? [] : [`cd ${shellQuoted(folder)}`]),
    'lorikeet data preview -c run.yaml',
    'lorikeet plan -c run.yaml',
    'lorikeet train -c run.yaml',
  ];
  if (ui.json) {
    ui.data({
      folder,
      files: files.map(([name]) => name),
      prompt_template: found.template ?? null,
      note: found.note ?? null,
      next,
    });
  }
  ui.line(`wrote ${files.map(([name]) => printable(join(folder, name))).join(', ')}`);
  if (found.missing && found.note !== undefined) ui.warn(printable(found.note, 1000));
  ui.line('next:');
  for (const line of next) ui.line(`  ${line}`);
}

async function exists(path: string): Promise<boolean> {
  return stat(path).then(
    () => true,
    () => false,
  );
}

/** A path as it is seen from a folder, with slashes. */
function placeFrom(folder: string, path: string): string {
  return isAbsolute(path) ? path : relative(resolve(folder), resolve(path)).split(sep).join('/');
}

/** A model's folder as it is seen from another; an id of the hub stays. */
async function from(folder: string, model: string): Promise<string> {
  return (await exists(model)) ? placeFrom(folder, model) : model;
}

/** Whether a model, where it is a folder, is of a width as the one of this repository. */
async function isSmall(model: string | undefined): Promise<boolean> {
  const file = join(model ?? '', 'config.json');
  const text = model === undefined ? undefined : await readFile(file, 'utf8').catch(() => undefined);
  const width = text === undefined ? undefined : parseJsonObject(text, file)['hidden_size'];
  return typeof width === 'number' && width <= 512;
}

/** Where editors find the schema: by a path that holds wherever the project lies, if the program is a part of it. */
function schemaPlace(folder: string): string {
  const path = placeFrom(folder, relative(process.cwd(), schemaFile));
  return path.startsWith('../../../') ? schemaFile : path;
}

/** How the user's rows become texts, by their columns. */
async function templateFor(file: string): Promise<TemplateFound> {
  let fields: Readonly<Record<string, unknown>> = {};
  for await (const row of readDataFile(file)) {
    fields = row.fields;
    break;
  }
  const columns = Object.keys(fields);
  const shown = printable(columns.join(', '), 300);
  try {
    const { name } = resolveTemplate({ columns });
    return { note: `The columns ${shown} are known: the template ${name} is used where none is set.`, missing: false };
  } catch (error) {
    const texts = columns.filter((name) => typeof fields[name] === 'string' && /^[A-Za-z_]\w*$/.test(name));
    const answer = answerFields.map((name) => texts.find((column) => column.toLowerCase() === name)).find(Boolean);
    const [first, second] = texts;
    if (answer !== undefined && texts.length > 1) {
      const others = texts.filter((name) => name !== answer);
      return {
        template: `${others.map((name) => `${heading(name)}: {${name}}\n`).join('')}${heading(answer)}: {${answer}}`,
        note: `The columns are ${shown}; ${answer} was taken for the answer, which is the last. Leave out what is no part of the prompt.`,
        missing: false,
      };
    }
    if (texts.length === 2) {
      return {
        template: `${heading(first)}: {${first}}\n${heading(second)}: {${second}}`,
        note: `The columns are ${shown}; the last one was taken for the answer. Turn it round if that is wrong.`,
        missing: false,
      };
    }
    return {
      note: `${errorMessage(error)}. Columns of texts whose names are words: ${texts.length === 0 ? 'none' : printable(texts.join(', '), 300)}.`,
      missing: true,
    };
  }
}

/** A column's name at the head of a line. */
const heading = (name: string): string => name.charAt(0).toUpperCase() + name.slice(1).replaceAll('_', ' ');

const sampleTemplate: TemplateFound = { template: 'Headline: {headline}\nSentiment: {sentiment}', missing: false };

/** Invented headlines with their sentiment: rows to train on, and others to measure on. */
function sampleFiles(): Readonly<Record<string, string>> {
  const { train, known } = demoHeadlines(7, { train: 120, known: 30, unseen: 0 });
  return { 'train.csv': csv(train), 'test.csv': csv(known) };
}

const csv = (rows: readonly Headline[]): string =>
  ['headline,sentiment', ...rows.map(({ text, label }) => `"${text.replaceAll('"', '""')}",${label}`), ''].join('\n');
