/** Where runs go at Weights & Biases, by the variables of the environment that its other clients read too. */
import type { Io } from '../ui.js';

/** Settings of this environment; undefined where a variable is not set. */
export interface WandbSettings {
  /** `offline`: nothing is sent until `sync`; `disabled`: nothing is kept for it either. */
  readonly mode: 'online' | 'offline' | 'disabled';
  readonly project: string | undefined;
  readonly entity: string | undefined;
  /** Address of the server, without a slash at its end. */
  readonly server: string | undefined;
  /** Never written to a file, nor into the environment of another process. */
  readonly key: string | undefined;
  /** What is wrong with a variable, which then counts as not set. */
  readonly problem: string | undefined;
}

/** The server that is meant when none is named. */
export const publicServer = 'https://api.wandb.ai';
/** The project that is meant when none is named. */
export const usualProject = 'lorikeet';

const modes: Readonly<Record<string, WandbSettings['mode']>> = {
  online: 'online',
  run: 'online',
  offline: 'offline',
  dryrun: 'offline',
  disabled: 'disabled',
};

/** Reads WANDB_MODE, WANDB_PROJECT, WANDB_ENTITY, WANDB_BASE_URL and WANDB_API_KEY. */
export function wandbSettings(env: Io['env']): WandbSettings {
  // An empty variable is one that is not set.
  const [mode, project, entity, server, key] = ['MODE', 'PROJECT', 'ENTITY', 'BASE_URL', 'API_KEY'].map(
    (name) => env[`WANDB_${name}`]?.trim() || undefined,
  );
  const known = mode === undefined ? 'online' : modes[mode];
  const usable = server === undefined || isServer(server);
  return {
    mode: known !== undefined && usable ? known : 'offline',
    project,
    entity,
    server: usable ? server?.replace(/\/+$/, '') : undefined,
    key,
    // The address is not shown: it may hold a password.
    problem: !usable
      ? 'WANDB_BASE_URL is no address such as https://wandb.example.com, without a user, a password or a query'
      : known === undefined
        ? `WANDB_MODE is ${mode}, which is none of online, offline and disabled`
        : undefined,
  };
}

function isServer(text: string): boolean {
  if (!URL.canParse(text)) return false;
  const { protocol, username, password, search, hash } = new URL(text);
  return /^https?:$/.test(protocol) && [username, password, search, hash].every((part) => part === '');
}
