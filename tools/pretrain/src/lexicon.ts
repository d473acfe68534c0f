import { capitalise, headlineTemplateVerbs, headlineVerbs } from 'lorikeet/demo';
import { loadGlosses, loadSenses, loadSpeeches, loadTagCounts, loadValences, type Sense } from './corpus.js';

/** Words of the synthetic statements that come from packages: things and places of the dictionary, words with a valence. */
export interface Lexicon {
  /** Names of made things, singular, with a definition that has no polar word. */
  readonly things: readonly { readonly name: string; readonly definition: string }[];
  /** Materials and foods, without a plural. */
  readonly materials: readonly string[];
  /** Cities and towns, capitalised. */
  readonly towns: readonly string[];
  readonly good: PolarWords;
  readonly bad: PolarWords;
  /** Sentences of the dictionary and of late speeches without a polar word. */
  readonly plainSentences: readonly string[];
}

/** Words of one polarity by the grammatical place they fit in. */
export interface PolarWords {
  /** "the outlook is ..." */
  readonly adjectives: readonly string[];
  /** "it brought ..." */
  readonly nouns: readonly string[];
  /** "it was ... by investors" */
  readonly participles: readonly string[];
}

/** Entries that have no place in business news, nor in what the base model is taught to write. */
const unfit =
  /\b(?:sex|sexual\w*|prostitut\w*|brothel|genital\w*|vagina\w*|penis|anus|anal|contracept\w*|obscene\w*|vulgar|slur|offensive|disparag\w*|derogatory|excrement|feces|torture|execution|slave\w*|narcotic|cocaine|heroin|homosexual\w*|nazi|whore\w*|incest|rape\w*)\b/i;

const unfitWords = new Set(
  `ass arse bastard bitch cock crap cunt damn dick fag faggot fuck goddamn hell jesus pimp piss prick slut shit sexy
   sucks twat wank rape raped rapist kinky suicide suicidal murderous mad insane dumb stupid retarded idiotic moron
   slavery christ god sodomy sin sinful virgin horny crappy shitty beloved boner`.split(/\s+/),
);

/** Beginnings of the demo's verbs, which the statements leave to it; six letters stand for all forms of a word. */
const reservedStems = new Set(
  [headlineVerbs.train, headlineVerbs.unseen]
    .flatMap(({ up, down }) => [...up, ...down])
    .concat(headlineTemplateVerbs.train, headlineTemplateVerbs.unseen)
    .map((verb) => stem(verb.split(' ')[0] as string)),
);

function stem(word: string): string {
  return word.slice(0, 6);
}

/** True when the demo's headlines use this word as a verb. */
export function isReserved(word: string): boolean {
  return reservedStems.has(stem(word.toLowerCase()));
}

/** True when an entry may be shown to the model. */
export function isFit(text: string): boolean {
  return !unfit.test(text) && !/\b\w*(?:fuck|shit|cunt|nigger|faggot|asshole)\w*\b/i.test(text);
}

/** Dictionary entries as documents, without the unfit ones. */
export function fitGlosses(senses: readonly Sense[]): string[] {
  return loadGlosses(
    senses.filter((sense) => isFit(`${sense.words.join(' ')} ${sense.definition} ${sense.examples.join(' ')}`)),
  );
}

/** Builds the lexicon from the installed packages; the same packages give the same lists. */
export async function loadLexicon(
  senses: readonly Sense[] = loadSenses(),
  speeches: readonly string[] = loadSpeeches(),
): Promise<Lexicon> {
  const tagged = loadTagCounts();
  const valences = await loadValences();
  const polar = (text: string): boolean =>
    (text.toLowerCase().match(/[a-z-]+/g) ?? []).some((word) => Math.abs(valences.get(word) ?? 0) > 0);

  const things: { name: string; definition: string }[] = [];
  const materials = new Set<string>();
  const towns = new Set<string>();
  const seen = new Set<string>();
  for (const sense of senses) {
    if (sense.pos !== 'n' || !isFit(`${sense.words.join(' ')} ${sense.definition}`)) continue;
    const name = sense.words[0] ?? '';
    const plain =
      /^[a-z]+(?: [a-z]+)?$/.test(name) && !polar(name) && !unfitWords.has(name) && !name.split(' ').some(isReserved);
    if (sense.file === 6 && plain && !seen.has(name) && /^(?:a|an) /.test(sense.definition)) {
      const common = (tagged.get(`n:${name}`) ?? 0) > 0 || name.includes(' ');
      if (
        common &&
        sense.definition.length < 110 &&
        !polar(sense.definition) &&
        !/[();]/.test(sense.definition) &&
        !sense.definition.split(/\W+/).some(isReserved)
      ) {
        seen.add(name);
        things.push({ name, definition: sense.definition });
      }
    } else if ((sense.file === 27 || sense.file === 13) && plain && (tagged.get(`n:${name}`) ?? 0) > 0) {
      materials.add(name);
    } else if (sense.file === 15 && /^[A-Z][a-z]+(?: [A-Z][a-z]+)?$/.test(name)) {
      if (
        /\b(?:city|town|capital|port)\b/.test(sense.definition) &&
        !/\b(?:ancient|biblical|battle|former)\b/.test(sense.definition)
      ) {
        towns.add(name);
      }
    }
  }

  const known = (pos: string): Set<string> =>
    new Set(senses.filter((s) => s.pos === pos).flatMap((s) => s.words.map((w) => w.toLowerCase())));
  const nouns = known('n');
  const verbs = known('v');
  const adjectives = known('a');
  const words = [...valences.keys()].filter(
    (word) => /^[a-z-]{3,}$/.test(word) && !unfitWords.has(word) && !isReserved(word) && isFit(word),
  );
  const ofSign = (sign: 1 | -1): PolarWords => {
    // The extremes are swear words.
    const signed = words.filter((word) => {
      const value = (valences.get(word) ?? 0) * sign;
      return value > 0 && value < (sign > 0 ? 5 : 4);
    });
    return {
      adjectives: signed.filter((word) => adjectives.has(word) && !nouns.has(word) && !verbs.has(word)),
      nouns: signed.filter(
        (word) => nouns.has(word) && !verbs.has(word) && !adjectives.has(word) && !word.endsWith('ing'),
      ),
      participles: signed.filter((word) => word.endsWith('ed') && word.length > 4),
    };
  };
  const examples = senses.flatMap((sense) => sense.examples).map((example) => `${capitalise(example)}.`);
  // The language of speeches before the middle of the twentieth century is far from news.
  const spoken = speeches.slice(-80).flatMap((speech) => speech.match(/(?<=[.] )[A-Z][^.!?"]{30,200}[.]/g) ?? []);
  const plainSentences = [...examples, ...spoken, ...spoken].filter(
    (text) =>
      text.split(' ').length >= 6 &&
      isFit(text) &&
      !/[[\]{}|~]|--/.test(text) &&
      !polar(text) &&
      !text.split(/\W+/).some(isReserved),
  );
  return { things, materials: [...materials], towns: [...towns], good: ofSign(1), bad: ofSign(-1), plainSentences };
}
