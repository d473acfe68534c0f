/**
 * A server on loopback between the SDK and the real one. The SDK drops what it could not send and takes any answer of
 * file_stream for a success; the relay tries again, and knows what has arrived. It also has the key, which the SDK does
 * not need to know, and leaves out lines that are there, since the SDK can only begin a run at its first line.
 */
import { randomBytes } from 'node:crypto';
import { once } from 'node:events';
import { createServer, type IncomingMessage } from 'node:http';
import { setTimeout as delay } from 'node:timers/promises';
import { z } from 'zod';

/** Where the requests go, and who is told what became of them. */
export interface RelayOptions {
  readonly server: string;
  readonly key: string;
  /** Lines from the first on that the server has. */
  readonly arrived: number;
  readonly attempts: number;
  /** The server has more lines now. */
  readonly onArrived: (lines: number) => void;
  /** The server knows that the run is over. */
  readonly onFinished: () => void;
  /** A request failed; after one that is final, none is answered. */
  readonly onTrouble: (text: string, final: boolean) => void;
}

/** A relay that listens. */
export interface Relay {
  /** Address for the SDK. */
  readonly url: string;
  /** What the SDK takes for its key: requests with another one are refused. */
  readonly token: string;
}

/** A request is given up after so long, and tried again after at most so long; in ms. */
const patience = 30_000;
const longestPause = 30_000;

const historyName = 'wandb-history.jsonl';

/** A request of file_stream, as far as the relay looks at it. */
const streamSchema = z.looseObject({
  complete: z.boolean().optional(),
  files: z
    .looseObject({ [historyName]: z.object({ offset: z.number(), content: z.array(z.string()) }).optional() })
    .optional(),
});

/** What an answer of GraphQL says of a failure. */
const answerSchema = z.object({
  errors: z.array(z.object({ message: z.string() })).optional(),
  data: z.object({ viewer: z.unknown().optional() }).nullish(),
});

const basic = (key: string): string => `Basic ${Buffer.from(`api:${key}`).toString('base64')}`;

/** Starts a relay on a free port of 127.0.0.1; it lives as long as the process. */
export async function startRelay(options: RelayOptions): Promise<Relay> {
  const token = randomBytes(24).toString('hex');
  let { arrived } = options;

  const answer = async (request: IncomingMessage): Promise<string> => {
    const path = request.url ?? '/';
    const stream = path.endsWith('/file_stream');
    const sent = await bodyOf(request);
    const part = stream ? withoutArrived(sent, arrived) : undefined;
    const body = await forward(options, path, request, part?.body ?? sent);
    if (!stream) {
      const refusal = refusalIn(body);
      if (refusal !== undefined) throw new Error(refusal);
    }
    if (part !== undefined && part.end > arrived) {
      arrived = part.end;
      options.onArrived(arrived);
    }
    if (part?.complete === true) options.onFinished();
    return body;
  };

  const relay = createServer((request, response) => {
    if (request.headers.authorization !== basic(token)) {
      response.writeHead(403).end();
      return;
    }
    answer(request).then(
      (body) => response.writeHead(200, { 'content-type': 'application/json' }).end(body),
      (error: unknown) => options.onTrouble(error instanceof Error ? error.message : String(error), true),
    );
  });
  relay.listen(0, '127.0.0.1');
  await once(relay, 'listening');
  const address = relay.address();
  if (address === null || typeof address === 'string') throw new Error('the relay has no port');
  return { url: `http://127.0.0.1:${address.port}`, token };
}

async function bodyOf(request: IncomingMessage): Promise<string> {
  let body = '';
  for await (const part of request.setEncoding('utf8')) body += String(part);
  return body;
}

/** Sends a request on, again and again where that may help; the text of the answer. */
async function forward(
  { server, key, attempts, onTrouble }: RelayOptions,
  path: string,
  { method = 'POST', headers }: IncomingMessage,
  body: string,
): Promise<string> {
  for (let attempt = 1; ; attempt++) {
    let trouble: string;
    try {
      const response = await fetch(server + path, {
        method,
        headers: {
          authorization: basic(key),
          'content-type': 'application/json',
          'user-agent': headers['user-agent'] ?? 'lorikeet',
        },
        body,
        redirect: 'manual',
        signal: AbortSignal.timeout(patience),
      });
      const text = await response.text();
      if (response.ok) return text;
      const { status } = response;
      if (status === 401 || status === 403) throw new Refusal(`${server} refused the key (status ${status})`);
      // A request that is wrong stays wrong.
      if (status < 500 && status !== 408 && status !== 429) throw new Refusal(`${server} answered status ${status}`);
      trouble = `${server} answered status ${status}`;
    } catch (error) {
      if (error instanceof Refusal) throw error;
      trouble = `${server} cannot be reached (${reason(error)})`;
    }
    if (attempt >= attempts) throw new Refusal(trouble);
    onTrouble(trouble, false);
    await delay(Math.min(longestPause, 250 * 2 ** attempt));
  }
}

/** A failure that another attempt would not mend. */
class Refusal extends Error {}

/** What `fetch` says is in the cause of its error. */
function reason(error: unknown): string {
  if (!(error instanceof Error)) return String(error);
  if (error.name === 'TimeoutError') return `no answer in ${patience / 1000} s`;
  const { cause } = error;
  if (cause instanceof AggregateError && cause.errors.length > 0) return reason(cause.errors[0]);
  return cause instanceof Error ? cause.message : error.message;
}

/** What an answer of GraphQL refuses, if it does: its status is 200 all the same. */
function refusalIn(body: string): string | undefined {
  let answer: z.infer<typeof answerSchema>;
  try {
    answer = answerSchema.parse(JSON.parse(body));
  } catch {
    return 'the answer is not that of its API; does WANDB_BASE_URL name the address of the API?';
  }
  const [error] = answer.errors ?? [];
  if (error !== undefined) return `the server refused the run: ${error.message}`;
  return answer.data?.viewer === null ? 'the server does not know the key' : undefined;
}

interface StreamPart {
  readonly body: string;
  /** Lines from the first on that the server has when it has taken this. */
  readonly end: number;
  readonly complete: boolean;
}

/** A request of file_stream without the lines that the server has. */
function withoutArrived(body: string, arrived: number): StreamPart {
  const request = streamSchema.parse(JSON.parse(body));
  const { complete = false, files = {} } = request;
  const { [historyName]: history, ...others } = files;
  if (history === undefined) return { body, end: arrived, complete };
  const there = Math.max(0, arrived - history.offset);
  const left = { offset: history.offset + there, content: history.content.slice(there) };
  return {
    body: JSON.stringify({
      ...request,
      files: left.content.length > 0 ? { [historyName]: left, ...others } : others,
    }),
    end: history.offset + history.content.length,
    complete,
  };
}
