/**
 * The run file as a JSON schema, for editors that complete and check YAML. Made of the same schemas that read a run file;
 * `run.schema.json` beside package.json is what it gives.
 */
import { fileURLToPath } from 'node:url';
import { z } from 'zod';
import { isAdapterSection } from './config-adapter.js';
import { keyMeaning } from './config-meanings.js';
import { aliases, dtypeSpellings, noops, sectionAliases } from './config-names.js';
import { configSchema } from './config-schema.js';
import { destinations } from './reporting/reporter.js';

type JsonSchema = z.core.JSONSchema.BaseSchema;

/** The published file, in src and in dist. */
export const schemaFile: string = fileURLToPath(new URL('../run.schema.json', import.meta.url));

/** The dotted name of the key that a place in the schema describes. */
function nameAt(path: readonly (string | number)[]): string | undefined {
  const [outer, first, inner, second, ...more] = path;
  if (outer !== 'properties' || more.length > 0) return undefined;
  if (inner === undefined) return String(first);
  return inner === 'properties' && second !== undefined ? `${first}.${second}` : undefined;
}

/** A run file's schema. Other spellings are in it, marked as deprecated, so that a file that is accepted shows no errors. */
export function runJsonSchema(): JsonSchema {
  const schema: JsonSchema = z.toJSONSchema(configSchema, {
    io: 'input',
    override: ({ jsonSchema: part, path }) => {
      // What a double holds is no limit that anybody needs to read; null stands for "not set".
      if (part.maximum === Number.MAX_SAFE_INTEGER) delete part.maximum;
      if (part.default === null) delete part.default;
      const name = nameAt(path);
      if (name === undefined) return;
      const meaning = keyMeaning(name);
      if (meaning !== undefined && part.description !== undefined) part.description = `${meaning}: ${part.description}`;
    },
  });
  const top = schema.properties ?? {};
  const at = (name: string): JsonSchema => {
    const [section, key] = name.split('.');
    const part = plain(top[section]);
    return key === undefined ? part : plain(part.properties?.[key]);
  };
  const replace = (name: string, forms: Pick<JsonSchema, 'anyOf' | 'enum'>): void => {
    const { description = '', default: standard } = at(name);
    top[name] = { description, ...(standard === undefined ? {} : { default: standard }), ...forms };
  };
  replace('dtype', { enum: ['auto', 'float32', 'float16', ...Object.keys(dtypeSpellings)] });
  replace('report_to', { anyOf: [{ enum: ['none', ...destinations] }, at('report_to')] });
  // An empty section is the method with its defaults.
  for (const [name, part] of Object.entries(top)) {
    if (isAdapterSection(name)) plain(part).type = ['object', 'null'];
  }
  /** Adds a key that is accepted and not to be written anew, which takes what `like` takes. */
  const add = (name: string, description: string, like: JsonSchema): void => {
    const [section, key] = name.split('.');
    const { default: _standard, ...takes } = like;
    const properties = key === undefined ? top : at(section).properties;
    if (properties !== undefined) properties[key ?? section] = { ...takes, description, deprecated: true };
  };
  for (const [name, meant] of Object.entries({ ...aliases, ...sectionAliases })) {
    if (keyMeaning(meant) !== undefined) add(name, `Read as ${meant}`, at(meant));
  }
  for (const [name, reason] of Object.entries(noops)) add(name, `Changes nothing here: ${reason}`, {});
  return { title: 'Run file of lorikeet', ...schema, patternProperties: { '^\\w+\\.\\w+$': {} } };
}

/** A schema that is no `true` or `false`. */
function plain(part: JsonSchema | boolean | undefined): JsonSchema {
  return typeof part === 'object' ? part : {};
}

/** The file's text. */
export function runSchemaText(): string {
  return `${JSON.stringify(runJsonSchema(), undefined, 2)}\n`;
}
