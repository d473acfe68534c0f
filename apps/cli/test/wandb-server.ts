/** A stand-in for the server of Weights & Biases, as far as its SDK for JavaScript calls it. */
import { once } from 'node:events';
import { createServer, type IncomingMessage, type Server } from 'node:http';
import { z } from 'zod';

/** A run as the server has it. */
export interface StoredRun {
  entity: string;
  project: string;
  displayName: string;
  config: Record<string, { value: unknown }>;
  /** Lines of the history, at their places. */
  lines: Record<string, number>[];
  summary: Record<string, number>;
  /** Undefined until the run is over. */
  exitCode: number | undefined;
}

/** What becomes of a request: answered, dropped before or after it was taken, refused with a status, never answered. */
export type Fate = 'answered' | 'dropped' | 'taken and dropped' | 'silent' | number;

const graphqlSchema = z.object({
  query: z.string(),
  variables: z
    .object({
      name: z.string().optional(),
      project: z.string().optional(),
      entity: z.string().optional(),
      displayName: z.string().optional(),
      config: z.string().optional(),
    })
    .optional(),
});

const streamSchema = z.object({
  files: z
    .object({
      'wandb-history.jsonl': z.object({ offset: z.number(), content: z.array(z.string()) }).optional(),
      'wandb-summary.json': z.object({ content: z.array(z.string()) }).optional(),
    })
    .optional(),
  complete: z.boolean().optional(),
  exitcode: z.number().optional(),
});

const rowSchema = z.record(z.string(), z.number());

/** The stand-in. */
export class WandbServer {
  readonly runs: Map<string, StoredRun> = new Map();
  /** Lines that each request of file_stream brought, by the place of the first. */
  readonly received: { readonly offset: number; readonly count: number }[] = [];
  /** The only key that it knows. */
  readonly key: string = 'k'.repeat(40);
  /** Decides over each request of file_stream; `count` is how many came before. */
  fate: (count: number) => Fate = () => 'answered';
  #requests = 0;
  #port = 0;
  #server: Server | undefined;

  get url(): string {
    return `http://127.0.0.1:${this.#port}`;
  }

  /** Listens; after `close` at the same port again. */
  async open(): Promise<void> {
    this.#server = createServer((request, response) => {
      void this.#answer(request).then(([status, body]) => {
        if (status === 'dropped') request.socket.destroy();
        else if (status !== 'silent') response.writeHead(status, { 'content-type': 'application/json' }).end(body);
      });
    });
    this.#server.listen(this.#port, '127.0.0.1');
    await once(this.#server, 'listening');
    const address = this.#server.address();
    if (typeof address === 'object' && address !== null) this.#port = address.port;
  }

  async close(): Promise<void> {
    const server = this.#server;
    this.#server = undefined;
    if (server === undefined) return;
    server.close();
    server.closeAllConnections();
    await once(server, 'close');
  }

  /** The only run. */
  run(): StoredRun {
    const [run, ...others] = this.runs.values();
    if (run === undefined || others.length > 0) throw new Error(`${this.runs.size} runs`);
    return run;
  }

  async #answer(request: IncomingMessage): Promise<[number | 'dropped' | 'silent', string]> {
    let text = '';
    for await (const part of request.setEncoding('utf8')) text += String(part);
    if (request.headers.authorization !== `Basic ${Buffer.from(`api:${this.key}`).toString('base64')}`) {
      return [401, ''];
    }
    if (request.url === '/graphql') return [200, JSON.stringify({ data: this.#graphql(text) })];
    const fate = this.fate(this.#requests++);
    if (fate === 'answered' || fate === 'taken and dropped') this.#stream(request.url ?? '', text);
    if (typeof fate === 'number') return [fate, ''];
    return fate === 'answered' ? [200, '{}'] : [fate === 'silent' ? 'silent' : 'dropped', ''];
  }

  #graphql(text: string): unknown {
    const { query, variables = {} } = graphqlSchema.parse(JSON.parse(text));
    if (query.includes('viewer')) return { viewer: { id: '1', entity: 'someone', flags: '{}', teams: { edges: [] } } };
    const { name = '', project = '', entity = '', displayName = '', config = '{}' } = variables;
    const parsed = z.record(z.string(), z.object({ value: z.unknown() })).parse(JSON.parse(config));
    const { lines = [], summary = {} } = this.runs.get(name) ?? {};
    this.runs.set(name, { entity, project, displayName, config: parsed, lines, summary, exitCode: undefined });
    return { upsertBucket: { bucket: { id: name, name, displayName, project: null }, inserted: true } };
  }

  #stream(path: string, text: string): void {
    const [, entity, project, id] = /^\/files\/([^/]+)\/([^/]+)\/([^/]+)\/file_stream$/.exec(path) ?? [];
    const run = this.runs.get(id);
    if (run === undefined || run.entity !== entity || run.project !== project) throw new Error(`no run at ${path}`);
    const { files = {}, complete, exitcode } = streamSchema.parse(JSON.parse(text));
    const { 'wandb-history.jsonl': history, 'wandb-summary.json': summary } = files;
    if (history !== undefined) {
      const { offset, content } = history;
      // The place of a line is its number: what comes again replaces what was there.
      for (const [i, line] of content.entries()) run.lines[offset + i] = rowSchema.parse(JSON.parse(line));
      this.received.push({ offset, count: content.length });
    }
    if (summary !== undefined) run.summary = rowSchema.parse(JSON.parse(summary.content[0]));
    if (complete === true) run.exitCode = exitcode;
  }
}
