/** What the page is given: JSON from the dashboard's server, or inside a report. Everything but numbers is shown as text. */
/** A stretch of a row's text and what becomes of its tokens. */
export interface PreviewSegment {
  readonly text: string;
  readonly kind: 'special' | 'truncated' | 'masked' | 'trained';
  /** True for what ends the completion. */
  readonly end: boolean;
}
/** A training row as the model sees it. */
export interface PreviewRow {
  /** File and line. */
  readonly where: string;
  readonly segments: readonly PreviewSegment[];
  /** Tokens that are trained, and all that the model sees. */
  readonly trained: number;
  readonly tokens: number;
  /** Why it is not trained on; null when it is. */
  readonly problem: string | null;
}
/** `overview.json`: what a run says of itself when it begins. */
export interface Overview {
  readonly name: string;
  /** ISO time. */
  readonly started: string;
  readonly total_steps: number;
  /** The table that is printed before the first step. */
  readonly facts: readonly (readonly [name: string, value: string])[];
  /** The run file with everything resolved, as YAML. */
  readonly settings: string;
  /** The first training rows. */
  readonly rows: readonly PreviewRow[];
}
/** A row with the loss of each of its tokens. */
export interface TokenLossRow {
  readonly where: string;
  /** Text, and -log p in nats of tokens that are trained. */
  readonly tokens: readonly (readonly [text: string, loss: number | null])[];
}
/** A line of predictions.jsonl. */
export interface Prediction {
  /** File and line. */
  readonly where: string;
  readonly prompt: string;
  readonly label: string;
  /** Null for an answer that is none of the labels. */
  readonly prediction: string | null;
  readonly answer: string;
}
/** A line of train_log.jsonl: numbers by name; null is what JSON makes of NaN. */
export type LogLine = Readonly<Record<string, number | null>>;
/** All of a run but its log. */
export interface RunView {
  /** The folder's name. */
  readonly folder: string;
  /** Of run.json; null while the run goes on, or when it was killed. */
  readonly status: string | null;
  readonly overview: Overview | null;
  /** Numbers of eval_results.json by dotted name. */
  readonly results: readonly (readonly [name: string, value: number])[];
  /** The first rows of predictions.jsonl, and how many there are. */
  readonly predictions: {
    readonly total: number;
    readonly rows: readonly Prediction[];
  };
  readonly tokenLosses: readonly TokenLossRow[];
  /** What could not be read. */
  readonly problems: readonly string[];
}
/** A part of a log. */
export interface LogPart {
  readonly lines: readonly LogLine[];
  /** Where the next part begins, to be sent with the next request. */
  readonly next: LogPlace;
  /** True when the file is another one than that of the request, so that what was read before is void. */
  readonly anew: boolean;
  /** True when there is more already. */
  readonly more: boolean;
}
/** A place in a log. */
export interface LogPlace {
  /** Tells one file from another of the same name. */
  readonly file: string;
  readonly bytes: number;
}
/** A run in a report. */
export interface ReportedRun {
  readonly view: RunView;
  readonly lines: readonly LogLine[];
}
//# sourceMappingURL=types.d.ts.map
