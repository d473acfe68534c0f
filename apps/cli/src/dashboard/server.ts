/** The dashboard's server: this machine's own browser is all that it talks to, and it has no path to a file. */
import { createServer, type IncomingMessage, type ServerResponse } from 'node:http';
import { join } from 'node:path';
import { CliError, errorCode, errorMessage } from '../errors.js';
import { logFile } from '../reporting/json-lines.js';
import { readPage } from './page.js';
import { readLogPart } from './run-log.js';
import { readRunView } from './run-view.js';

const host = '127.0.0.1';

const headers = {
  'Content-Security-Policy':
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
  'X-Content-Type-Options': 'nosniff',
  'Referrer-Policy': 'no-referrer',
  'Cross-Origin-Resource-Policy': 'same-origin',
  'Cross-Origin-Opener-Policy': 'same-origin',
  'Cache-Control': 'no-store',
} as const;

/** A dashboard that is being served. */
export interface Dashboard {
  readonly url: string;
  /** Ends it, with the connections that are open. */
  close(): Promise<void>;
}

/** What is sent back. */
interface Answer {
  readonly status?: number;
  readonly type: 'text/html' | 'text/css' | 'text/javascript' | 'application/json' | 'text/plain';
  readonly body: string;
}

const refusal = (status: number, body: string): Answer => ({ status, type: 'text/plain', body: `${body}\n` });
const json = (value: unknown): Answer => ({ type: 'application/json', body: JSON.stringify(value) });

/**
 * Serves runs on this machine's loopback address.
 * @param folders folders of runs
 * @param port 0 for any that is free
 * @throws CliError when the port is taken
 */
export async function serveDashboard(folders: readonly string[], port = 0): Promise<Dashboard> {
  const page = await readPage();
  const files: Readonly<Record<string, Answer>> = {
    '/': { type: 'text/html', body: page.html },
    '/page.css': { type: 'text/css', body: page.css },
    '/page.js': { type: 'text/javascript', body: page.js },
  };
  let allowed: readonly string[] = [];

  const answer = async (request: IncomingMessage): Promise<Answer> => {
    // A page elsewhere whose name is made to lead here (DNS rebinding) sends its own name.
    if (!allowed.includes(request.headers.host ?? '')) return refusal(403, 'this host name is not served');
    if (request.method !== 'GET') return refusal(405, 'only GET is answered');
    const [path = '', query = ''] = (request.url ?? '').split('?', 2);
    if (Object.hasOwn(files, path)) return files[path];
    if (path === '/api/runs') return json({ count: folders.length });
    const [, number, log] = /^\/api\/runs\/(\d{1,4})(\/log)?$/.exec(path) ?? [];
    const folder = number === undefined ? undefined : folders[Number(number)];
    if (folder === undefined) return refusal(404, 'there is nothing here');
    if (log === undefined) return json(await readRunView(folder));
    const asked = new URLSearchParams(query);
    const bytes = Number(asked.get('bytes') ?? 0);
    if (!Number.isSafeInteger(bytes) || bytes < 0) return refusal(400, 'bytes is a whole number, 0 or more');
    return json(await readLogPart(join(folder, logFile), { file: asked.get('file') ?? '', bytes }));
  };
  const send = (response: ServerResponse, { status = 200, type, body }: Answer): void => {
    response.writeHead(status, { ...headers, 'Content-Type': `${type}; charset=utf-8` });
    response.end(body);
  };

  const server = createServer((request, response) => {
    answer(request).then(
      (given) => send(response, given),
      (error: unknown) => send(response, refusal(500, errorMessage(error))),
    );
  });
  await new Promise<void>((resolve, reject) => {
    server.once('error', (error) => {
      const taken = errorCode(error) === 'EADDRINUSE';
      reject(
        new CliError(taken ? `port ${port} is taken` : `cannot listen on port ${port}: ${error.message}`, {
          fix: 'Give another --port, or none for any that is free.',
          cause: error,
        }),
      );
    });
    server.listen(port, host, resolve);
  });
  const address = server.address();
  if (address === null || typeof address === 'string') throw new Error('the dashboard has no port');
  allowed = [`${host}:${address.port}`, `localhost:${address.port}`];
  return {
    url: `http://${host}:${address.port}/`,
    close: () =>
      new Promise((resolve) => {
        server.close(() => resolve());
        server.closeAllConnections();
      }),
  };
}
