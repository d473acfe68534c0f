/** `lorikeet config`: the keys of a run file, for people and for editors. */
import { aliases } from '../config-names.js';
import { runJsonSchema, runSchemaText } from '../config-json-schema.js';
import { keyMeaning } from '../config-meanings.js';
import { configKeys } from '../config-schema.js';
import type { CommandContext } from '../context.js';
import { UsageError } from '../errors.js';
import { quoted } from '../text.js';

/** Prints the JSON schema, on one line with `--json`. */
export function printSchema({ ui, io }: CommandContext): void {
  if (ui.json) ui.data(runJsonSchema());
  else io.stdout.write(runSchemaText());
}

/** Prints what keys mean and take: all, or those whose names or meanings have a word. */
export function printKeys({ ui }: CommandContext, word: string | undefined): void {
  const wanted = word?.toLowerCase() ?? '';
  const rows = configKeys()
    .map((item) => ({
      ...item,
      meaning: keyMeaning(item.key) ?? '',
      spellings: Object.keys(aliases).filter((name) => aliases[name] === item.key),
    }))
    .filter(({ key, meaning, spellings }) =>
      [key, meaning, ...spellings].some((text) => text.toLowerCase().includes(wanted)),
    );
  if (rows.length === 0) {
    throw new UsageError(`no key of a run file has ${quoted(word)} in its name or its meaning`, {
      fix: '`lorikeet config keys` lists all.',
    });
  }
  if (ui.json) ui.data(rows.map(({ key, standard, ...row }) => ({ key, ...row, default: standard })));
  const { bold, dim } = ui.colors;
  for (const { key, takes, standard, meaning, spellings } of rows) {
    ui.line(bold(key));
    ui.line(`  ${meaning}`);
    ui.line(dim(`  ${takes} (default: ${standard})${spellings.length === 0 ? '' : `; also ${spellings.join(', ')}`}`));
  }
}
