import { createHash, randomBytes } from 'node:crypto';
import { mkdir, mkdtemp, readdir, readFile, rename, rm, stat, writeFile } from 'node:fs/promises';
import { createServer, type IncomingMessage, type Server, type ServerResponse } from 'node:http';
import { tmpdir } from 'node:os';
import { basename, join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { CliError } from './errors.js';
import {
  type HubOptions,
  type HubProgress,
  resolveAdapter,
  resolveDataset,
  resolveModel,
  resolveTokenizer,
} from './hub.js';

const commit = 'a'.repeat(40);

/** A hub on the loopback interface with one repository, whose faults the tests choose. */
class FakeHub {
  readonly files = new Map<string, Buffer>();
  /** Every request: method, path and the headers that matter. */
  readonly requests: { url: string; range: string | undefined; token: string | undefined }[] = [];
  /** Names in the listing that have no content. */
  listed: string[] = [];
  /** Bytes after which the next transfers of each file break off. */
  breaks = new Map<string, number[]>();
  /** Files whose next transfer has a wrong byte. */
  damage = new Set<string>();
  /** Files that are redirected to another origin. */
  elsewhere: string | undefined;
  /** Status for the API (without a token), for the files, and its code. */
  refuse: { api?: number; files?: number; code?: string; token?: string } = {};
  /** Answers Range requests with the whole file. */
  ignoreRange = false;
  /** Leaves hashes out of the listing. */
  noHashes = false;
  /** Transfers that send a part and then nothing more. */
  stalls = 0;
  kind: 'models' | 'datasets' = 'models';
  readonly id = 'org/name';
  #server: Server | undefined;
  endpoint = '';

  async start(): Promise<void> {
    const server = createServer((request, response) => this.#answer(request, response));
    this.#server = server;
    await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
    const address = server.address();
    if (address === null || typeof address === 'string') throw new Error('no port');
    this.endpoint = `http://127.0.0.1:${address.port}`;
  }

  async stop(): Promise<void> {
    const server = this.#server;
    if (server === undefined) return;
    server.closeAllConnections();
    await new Promise((resolve) => server.close(resolve));
  }

  transfers(name: string): { range: string | undefined; token: string | undefined }[] {
    return this.requests.filter((request) => request.url.endsWith(`/${name}`) && request.url.includes('/resolve/'));
  }

  #answer(request: IncomingMessage, response: ServerResponse): void {
    const url = request.url ?? '';
    const token = request.headers.authorization;
    this.requests.push({ url, range: request.headers.range, token });
    const path = url.split('?')[0] ?? '';
    const allowed = this.refuse.token !== undefined && token === `Bearer ${this.refuse.token}`;
    const fail = (status: number): void => {
      response.writeHead(status, this.refuse.code === undefined ? {} : { 'x-error-code': this.refuse.code }).end('no');
    };
    if (path.startsWith('/api/')) {
      if (this.refuse.api !== undefined && !allowed) return fail(this.refuse.api);
      const body = path.includes('/tree/')
        ? [
            ...[...this.files].map(([name, data]) => this.#entry(name, data)),
            ...this.listed.map((name) => ({ type: 'file', path: name, size: 3 })),
          ]
        : { _id: '1', id: this.id, sha: commit, private: false, lastModified: '2026-01-01T00:00:00Z' };
      response.writeHead(200, { 'content-type': 'application/json' }).end(JSON.stringify(body));
      return;
    }
    if (this.refuse.files !== undefined && !allowed) return fail(this.refuse.files);
    const prefix = `${this.kind === 'datasets' ? '/datasets' : ''}/${this.id}/resolve/${commit}/`;
    const name = decodeURIComponent(path.startsWith(prefix) ? path.slice(prefix.length) : path.slice(1));
    if (this.elsewhere !== undefined && path.startsWith(prefix)) {
      response.writeHead(302, { location: `${this.elsewhere}/${name}` }).end();
      return;
    }
    const whole = this.files.get(name);
    if (whole === undefined) return fail(404);
    const start = this.ignoreRange ? 0 : Number(/bytes=(\d+)-/.exec(request.headers.range ?? '')?.[1] ?? 0);
    let data = whole.subarray(start);
    if (this.damage.delete(name)) {
      data = Buffer.from(data);
      data[0] = (data[0] ?? 0) ^ 1;
    }
    response.writeHead(start > 0 ? 206 : 200, {
      'content-length': data.length,
      ...(start > 0 ? { 'content-range': `bytes ${start}-${whole.length - 1}/${whole.length}` } : {}),
    });
    const cut = this.breaks.get(name)?.shift();
    if (cut !== undefined) {
      response.write(data.subarray(0, cut), () => setTimeout(() => response.destroy(), 20));
      return;
    }
    if (this.stalls > 0 && data.length > 1000) {
      this.stalls--;
      response.write(data.subarray(0, 100));
      return;
    }
    response.end(data);
  }

  #entry(name: string, data: Buffer): unknown {
    const base = { type: 'file', path: name, size: data.length };
    if (this.noHashes) return base;
    if (name.endsWith('.safetensors') || name.endsWith('.parquet')) {
      const oid = createHash('sha256').update(data).digest('hex');
      return { ...base, oid: 'b'.repeat(40), lfs: { oid, size: data.length, pointerSize: 130 } };
    }
    return { ...base, oid: createHash('sha1').update(`blob ${data.length}\0`).update(data).digest('hex') };
  }
}

let hub: FakeHub;
let folder: string;

function options(more: HubOptions = {}): HubOptions {
  return {
    endpoint: hub.endpoint,
    cacheDir: join(folder, 'cache'),
    env: { HF_HOME: join(folder, 'home') },
    retryDelayMs: 1,
    ...more,
  };
}

async function failure(promise: Promise<unknown>): Promise<CliError> {
  try {
    await promise;
  } catch (error) {
    if (error instanceof CliError) return error;
    throw error;
  }
  throw new Error('it did not fail');
}

/**
 * Where the transfers of the weights started. Of a connection that breaks off, the reader may lose what it has not taken
 * yet, so only the server knows an exact place.
 */
function transferStarts(): number[] {
  return hub.transfers('model.safetensors').map(({ range }) => Number(/^bytes=(\d+)-$/.exec(range ?? '')?.[1] ?? 0));
}

/** Compared by Buffer: `toEqual` takes seconds for the larger files. */
async function sameBytes(path: string, name: string): Promise<boolean> {
  return hub.files.get(name)?.equals(await readFile(path)) ?? false;
}

async function filesBelow(path: string): Promise<string[]> {
  const entries = await readdir(path, { recursive: true, withFileTypes: true }).catch(() => []);
  return entries.filter((entry) => !entry.isDirectory()).map((entry) => entry.name);
}

beforeEach(async () => {
  folder = await mkdtemp(join(tmpdir(), 'lorikeet-hub-'));
  hub = new FakeHub();
  hub.files.set('config.json', Buffer.from('{"model_type":"mistral"}'));
  hub.files.set('tokenizer.json', Buffer.from('{}'));
  hub.files.set('README.md', Buffer.from('words'));
  hub.files.set('consolidated.safetensors', randomBytes(500));
  hub.files.set('pytorch_model.bin', randomBytes(500));
  hub.files.set('model.safetensors', randomBytes(300_000));
  await hub.start();
});

afterEach(async () => {
  await hub.stop();
  await rm(folder, { recursive: true, force: true });
});

describe('resolveModel from a hub', () => {
  it('fetches what is needed and nothing else, and again only asks', async () => {
    const seen: HubProgress[] = [];
    const path = await resolveModel(hub.id, options({ onProgress: (progress) => seen.push(progress) }));
    expect((await readdir(path)).sort()).toEqual(['config.json', 'model.safetensors', 'tokenizer.json']);
    expect(await sameBytes(join(path, 'model.safetensors'), 'model.safetensors')).toBe(true);
    expect(await readFile(join(folder, 'cache', 'models--org--name', 'refs', 'main'), 'utf8')).toBe(commit);
    expect(seen.at(-1)).toEqual({ file: 'model.safetensors', doneBytes: 300_000, totalBytes: 300_000 });
    const before = hub.requests.length;
    expect(await resolveModel(hub.id, options())).toBe(path);
    expect(hub.requests.slice(before).every((request) => request.url.startsWith('/api/'))).toBe(true);
  });

  it('continues a transfer that breaks off and ends with the right bytes', async () => {
    hub.breaks.set('model.safetensors', [100_000, 70_000]);
    const path = await resolveModel(hub.id, options());
    expect(await sameBytes(join(path, 'model.safetensors'), 'model.safetensors')).toBe(true);
    const starts = transferStarts();
    expect(starts.length).toBe(3);
    expect(starts[0]).toBe(0);
    expect(starts[1]).toBeLessThanOrEqual(100_000);
    expect(starts[2]).toBeGreaterThan(starts[1] ?? 0);
    expect(starts[2]).toBeLessThanOrEqual(170_000);
  });

  it('keeps what arrived when it gives up, and another run continues', async () => {
    hub.breaks.set('model.safetensors', [100_000, 0, 0, 0, 0, 0]);
    const error = await failure(resolveModel(hub.id, options()));
    const kept = Number(/broke off at (\d+) of 300000 bytes.*run the same command again/.exec(error.message)?.[1]);
    expect(kept).toBeGreaterThan(0);
    expect(kept).toBeLessThanOrEqual(100_000);
    expect(await readFile(join(folder, 'cache', 'models--org--name', 'refs', 'main')).catch(() => 'none')).toBe('none');
    expect((await failure(resolveModel(hub.id, options({ offline: true })))).message).toMatch(/offline mode/);
    hub.breaks.clear();
    const path = await resolveModel(hub.id, options());
    expect(transferStarts().at(-1)).toBe(kept);
    expect(await sameBytes(join(path, 'model.safetensors'), 'model.safetensors')).toBe(true);
  });

  it('several at once do not harm each other, whatever breaks off', async () => {
    for (let round = 0; round < 21; round++) {
      const cacheDir = join(folder, `cache-${round}`);
      hub.breaks.set('model.safetensors', [100_000, 50_000, 0, 299_999].slice(0, round % 5));
      if (round % 3 === 2) hub.damage.add('model.safetensors');
      const users = Array.from({ length: 2 + (round % 3) }, async (_, i) => {
        await new Promise((resolve) => setTimeout(resolve, i * (round % 7)));
        const path = await resolveModel(hub.id, options({ cacheDir }));
        // Whoever is done must be able to read at once, also while the others are still at it.
        return sameBytes(join(path, 'model.safetensors'), 'model.safetensors');
      });
      expect(await Promise.all(users)).not.toContain(false);
      expect((await filesBelow(cacheDir)).filter((name) => /incomplete|tmp/.test(name))).toEqual([]);
      hub.breaks.clear();
      hub.damage.clear();
    }
  });

  it('continues what a killed process left, and leaves alone what another is writing', async () => {
    hub.breaks.set('model.safetensors', [100_000, 0, 0, 0, 0, 0]);
    await failure(resolveModel(hub.id, options()));
    const blobs = join(folder, 'cache', 'models--org--name', 'blobs');
    const left = (await readdir(blobs)).find((name) => name.endsWith('.incomplete')) ?? '';
    const ownedBy = (pid: number): string => left.replace(/-\d+-(\d+-[0-9a-f]{8})/, `-${pid}-$1`);
    expect(ownedBy(process.pid)).toBe(left);
    hub.breaks.clear();
    const other = join(blobs, ownedBy(process.ppid));
    await rename(join(blobs, left), other);
    await resolveModel(hub.id, options());
    expect(transferStarts().at(-1)).toBe(0);
    const { size } = await stat(other);

    // No process has this number: it is above what any system gives.
    await rename(other, join(blobs, ownedBy(2 ** 30)));
    await rm(join(blobs, left.split('.')[0] ?? ''));
    await rm(join(folder, 'cache', 'models--org--name', 'snapshots'), { recursive: true });
    const path = await resolveModel(hub.id, options());
    expect(size).toBeGreaterThan(0);
    expect(transferStarts().at(-1)).toBe(size);
    expect(await sameBytes(join(path, 'model.safetensors'), 'model.safetensors')).toBe(true);
    expect((await readdir(blobs)).filter((name) => name.endsWith('.incomplete'))).toEqual([]);
  });

  it('starts over when the server ignores the range', async () => {
    hub.breaks.set('model.safetensors', [100_000]);
    hub.ignoreRange = true;
    const path = await resolveModel(hub.id, options());
    expect(await sameBytes(join(path, 'model.safetensors'), 'model.safetensors')).toBe(true);
  });

  it('counts a transfer that stands still as broken off', async () => {
    hub.stalls = 1;
    const path = await resolveModel(hub.id, options({ stallMs: 150 }));
    expect(await sameBytes(join(path, 'model.safetensors'), 'model.safetensors')).toBe(true);
    // A busy machine may stand still more often.
    expect(transferStarts().slice(0, 2)).toEqual([0, 100]);
  });

  it.each(['model.safetensors', 'config.json'])(
    'finds damage in %s by its hash, fetches again, and gives up after two',
    async (name) => {
      const notes: string[] = [];
      hub.damage.add(name);
      const path = await resolveModel(hub.id, options({ onNote: (note) => notes.push(note) }));
      expect(notes).toEqual([`${name} arrived damaged and is fetched again`]);
      expect(await sameBytes(join(path, name), name)).toBe(true);

      await rm(join(folder, 'cache'), { recursive: true });
      hub.damage = new Set([name]);
      hub.damage.delete = (value: string): boolean => hub.damage.has(value);
      expect((await failure(resolveModel(hub.id, options()))).message).toMatch(
        /arrived damaged twice: its (sha256|git-sha1) is/,
      );
      expect(await filesBelow(join(folder, 'cache', 'models--org--name', 'snapshots'))).not.toContain(name);
    },
  );

  it('takes a file that the server lists without a hash by its size', async () => {
    hub.noHashes = true;
    hub.breaks.set('model.safetensors', [1000]);
    const path = await resolveModel(hub.id, options());
    expect(await sameBytes(join(path, 'model.safetensors'), 'model.safetensors')).toBe(true);
  });

  it('fetches the shards that the index names', async () => {
    hub.files.delete('model.safetensors');
    const map = {
      a: 'model-00001-of-00002.safetensors',
      b: 'model-00002-of-00002.safetensors',
      c: 'model-00001-of-00002.safetensors',
    };
    hub.files.set('model.safetensors.index.json', Buffer.from(JSON.stringify({ metadata: {}, weight_map: map })));
    hub.files.set(map.a, randomBytes(100));
    hub.files.set(map.b, randomBytes(100));
    const path = await resolveModel(hub.id, options());
    expect((await readdir(path)).filter((name) => name.endsWith('.safetensors')).sort()).toEqual([map.a, map.b]);
    hub.files.delete(map.b);
    await rm(join(folder, 'cache'), { recursive: true });
    expect((await failure(resolveModel(hub.id, options()))).message).toContain(
      `names files that the repository lacks: "${map.b}"`,
    );
  });

  it('says what is there when there are no safetensors', async () => {
    hub.files.delete('model.safetensors');
    expect((await failure(resolveModel(hub.id, options()))).message).toMatch(
      /no safetensors weights, only pytorch_model.bin/,
    );
  });

  it('sends the token to the endpoint and not to where files are redirected', async () => {
    const storage = new FakeHub();
    await storage.start();
    try {
      for (const [name, data] of hub.files) storage.files.set(name, data);
      hub.elsewhere = storage.endpoint;
      hub.refuse = { api: 401, files: 401, token: 'hf_secret' };
      await resolveModel(hub.id, options({ env: { HF_TOKEN: 'hf_secret' } }));
      expect(hub.requests.every((request) => request.token === 'Bearer hf_secret')).toBe(true);
      expect(storage.requests.length).toBeGreaterThan(0);
      expect(storage.requests.every((request) => request.token === undefined)).toBe(true);
    } finally {
      await storage.stop();
    }
  });

  it('reads the token that the Python tools left', async () => {
    await mkdir(join(folder, 'home'));
    await writeFile(join(folder, 'home', 'token'), 'hf_file\n');
    hub.refuse = { api: 401, files: 401, token: 'hf_file' };
    expect(await readdir(await resolveModel(hub.id, options()))).toContain('config.json');
  });

  it.each([
    [{ api: 401 }, undefined, /401: there is no such model, or it is private or gated.*set HF_TOKEN/],
    [{ api: 401 }, 'hf_old', /401: the access token is not valid/],
    [
      { files: 403, code: 'GatedRepo' },
      undefined,
      /403: this model is gated.*Accept the terms at http.*org\/name and set HF_TOKEN/,
    ],
    [{ files: 403, code: 'GatedRepo' }, 'hf_mine', /the account of this token has no access/],
    [{ api: 404 }, undefined, /404: there is no such model.*Check the spelling/],
    [{ api: 404, code: 'RevisionNotFound' }, undefined, /org\/name has no revision "main"/],
    [{ api: 429 }, undefined, /429: too many requests/],
    [{ api: 500 }, undefined, /500/],
  ])('explains %j (token %s)', async (refuse, token, pattern) => {
    hub.refuse = refuse;
    const error = await failure(resolveModel(hub.id, options({ token })));
    expect(error.message).toMatch(pattern);
    expect(error.message).not.toContain('hf_');
    expect(error.exitCode).toBe(1);
  });

  it.each([
    '../outside.json',
    '/etc/x.json',
    'a/../../b.json',
    'C:\\x.json',
    'a\\b.json',
    'a//b.json',
    'nul\u0000.json',
  ])('refuses a repository that lists %j, and writes nothing', async (name) => {
    hub.listed = [name];
    expect((await failure(resolveModel(hub.id, options()))).message).toContain('leads out of its folder');
    expect(await filesBelow(folder)).toEqual([]);
  });

  it('refuses revisions that are paths', async () => {
    expect((await failure(resolveModel(hub.id, options({ revision: '../../x' })))).message).toContain(
      'not the name of a branch',
    );
  });

  it('stops when told to, keeping what arrived', async () => {
    const controller = new AbortController();
    const stop = new CliError('stopped');
    const promise = resolveModel(
      hub.id,
      options({
        signal: controller.signal,
        onProgress: ({ file, doneBytes }) => {
          if (file === 'model.safetensors' && doneBytes > 0) controller.abort(stop);
        },
      }),
    );
    await expect(promise).rejects.toBe(stop);
  });

  it('uses the cache offline, and when the server is gone', async () => {
    const path = await resolveModel(hub.id, options());
    const before = hub.requests.length;
    expect(await resolveModel(hub.id, options({ env: { HF_HUB_OFFLINE: '1' } }))).toBe(path);
    expect(hub.requests.length).toBe(before);
    await hub.stop();
    const notes: string[] = [];
    expect(await resolveModel(hub.id, options({ onNote: (note) => notes.push(note) }))).toBe(path);
    expect(notes[0]).toMatch(/cannot be reached; org\/name is taken from the cache/);
    expect((await failure(resolveModel('org/other', options()))).message).toMatch(/cannot be reached: .*ECONNREFUSED/);
    expect((await failure(resolveModel('org/other', options({ offline: true })))).message).toMatch(
      /not in the cache.*offline mode/,
    );
    await rm(join(path, 'model.safetensors'));
    expect((await failure(resolveModel(hub.id, options({ offline: true })))).message).toMatch(
      /not whole \(model.safetensors missing\)/,
    );
  });

  it('finds the cache through the environment', async () => {
    const path = await resolveModel(hub.id, { env: { HF_ENDPOINT: `${hub.endpoint}/`, HF_HOME: join(folder, 'h') } });
    expect(path).toBe(join(folder, 'h', 'hub', 'models--org--name', 'snapshots', commit));
  });
});

describe('resolveTokenizer', () => {
  it('fetches no weights, and is not taken for a whole model later', async () => {
    const path = await resolveTokenizer(hub.id, options());
    expect((await readdir(path)).sort()).toEqual(['config.json', 'tokenizer.json']);
    expect(await resolveTokenizer(hub.id, options({ offline: true }))).toBe(path);
    expect((await failure(resolveModel(hub.id, options({ offline: true })))).message).toMatch(
      /not whole \(model.safetensors missing\)/,
    );
    await rm(join(path, 'tokenizer.json'));
    expect((await failure(resolveTokenizer(hub.id, options({ offline: true })))).message).toMatch(
      /not whole \(tokenizer.json missing\)/,
    );
    expect(await resolveTokenizer(folder)).toBe(folder);
  });
});

describe('names that are paths', () => {
  it('takes a folder that exists', async () => {
    expect(await resolveModel(folder, options())).toBe(folder);
    expect(hub.requests).toEqual([]);
  });

  it.each(['./missing/model', '/missing/model', '~/missing-lorikeet', 'a\\b', '../x', 'a/b/c', 'C:model'])(
    'does not ask a server about %s',
    async (name) => {
      expect((await failure(resolveModel(name, options()))).message).toMatch(/there is no such model folder/);
      expect(hub.requests).toEqual([]);
    },
  );

  it('refuses a file', async () => {
    const file = join(folder, 'model.safetensors');
    await writeFile(file, 'x');
    expect((await failure(resolveModel(file, options()))).message).toMatch(/this is a file; a model is a folder/);
  });

  it.each(['a b', 'org/na me', 'org/..', 'a--b', 'org/x.git'])('refuses the id %j', async (name) => {
    expect((await failure(resolveModel(name, options()))).message).toMatch(/neither a folder here nor the id/);
  });
});

describe('resolveAdapter', () => {
  it('fetches the two files and what belongs to the tokenizer', async () => {
    hub.files.clear();
    hub.files.set('adapter_config.json', Buffer.from('{"peft_type":"LORA"}'));
    hub.files.set('adapter_model.safetensors', randomBytes(50));
    hub.files.set('tokenizer_config.json', Buffer.from('{}'));
    hub.files.set('optimizer.pt', randomBytes(50));
    const path = await resolveAdapter(hub.id, options());
    expect((await readdir(path)).sort()).toEqual([
      'adapter_config.json',
      'adapter_model.safetensors',
      'tokenizer_config.json',
    ]);
    expect(await resolveAdapter(hub.id, options({ offline: true }))).toBe(path);
  });

  it('says when only a pickle is there', async () => {
    hub.files.clear();
    hub.files.set('adapter_config.json', Buffer.from('{}'));
    hub.files.set('adapter_model.bin', Buffer.from('x'));
    expect((await failure(resolveAdapter(hub.id, options()))).message).toMatch(
      /adapter_model.bin, which can run code and is not read/,
    );
  });

  it('a model given as adapter, an adapter given as model', async () => {
    expect((await failure(resolveAdapter(hub.id, options()))).message).toMatch(/has no adapter_config.json/);
    hub.files.clear();
    hub.files.set('adapter_config.json', Buffer.from('{}'));
    expect((await failure(resolveModel(hub.id, options()))).message).toMatch(/It is an adapter: give it as --adapter/);
  });
});

describe('resolveDataset', () => {
  it('fetches the data files of a hub set by split, and again offline', async () => {
    hub.kind = 'datasets';
    hub.files.clear();
    hub.files.set('README.md', Buffer.from('# words'));
    hub.files.set('data/train-00000-of-00001-abc.parquet', randomBytes(30));
    hub.files.set('data/validation-00000-of-00001-abc.parquet', randomBytes(30));
    hub.files.set('dataset_infos.json', Buffer.from('{}'));
    const found = await resolveDataset(hub.id, options());
    expect(found.train.map((path) => basename(path))).toEqual(['train-00000-of-00001-abc.parquet']);
    expect(found.validation.map((path) => basename(path))).toEqual(['validation-00000-of-00001-abc.parquet']);
    expect(await sameBytes(found.train[0] ?? '', 'data/train-00000-of-00001-abc.parquet')).toBe(true);
    expect(await resolveDataset(hub.id, options({ offline: true }))).toEqual(found);
    expect(hub.transfers('dataset_infos.json')).toEqual([]);
  });

  it('reads a folder the same way', async () => {
    await mkdir(join(folder, 'set', 'test'), { recursive: true });
    await writeFile(join(folder, 'set', 'train.jsonl'), '{}');
    await writeFile(join(folder, 'set', 'test', '0.jsonl'), '{}');
    expect(await resolveDataset(join(folder, 'set'))).toEqual({
      train: [join(folder, 'set', 'train.jsonl')],
      validation: [],
      test: [join(folder, 'set', 'test', '0.jsonl')],
      format: 'jsonl',
    });
  });
});
