import { capitalise, expand } from './grammar.js';
import { TextRandom } from './random.js';

/**
 * Synthetic financial headlines for the demo: our own grammar, copied from no data set, and sharing no template, verb or
 * company with the statements that the base model was pretrained on (a test of the pretraining tool holds them apart).
 *
 * Three parts: `train`; `known`, the training templates with companies and numbers that training has not; and `unseen`,
 * templates, verbs, companies and reasons that training has not: there the label has to come from what the base model
 * knows of words such as "sluggish" and of the order of numbers.
 */

export type HeadlineLabel = 'negative' | 'neutral' | 'positive';

/** A synthetic headline; `template` counts within its part and label. */
export interface Headline {
  readonly text: string;
  readonly label: HeadlineLabel;
  readonly template: number;
}

/** The three parts of the demo's data. */
export interface HeadlineParts {
  readonly train: readonly Headline[];
  readonly known: readonly Headline[];
  readonly unseen: readonly Headline[];
}

export const headlineLabels: readonly HeadlineLabel[] = ['negative', 'neutral', 'positive'];

const list = (text: string): readonly string[] => text.trim().split(/\s*[,\n]\s*/);

/** First words of company names; each part has its own. */
export const headlineCompanies: Readonly<Record<keyof HeadlineParts, readonly string[]>> = {
  train:
    list(`Quarrington, Thistlemere, Oakhaven, Brindlewick, Copperfold, Dunmarrow, Eastwhistle, Fennimore, Gadsworth, Hollowbrook,
    Ivorygate, Juniperdale, Kettlebury, Larkspurne, Mossington, Nettlecombe, Otterbourne, Pennyforth, Quillbridge, Ravenscroft,
    Saltmarshe, Tanglewood, Underhay, Violetton, Windlesham, Yarrowdene, Zephyrine, Amberleigh, Bramblecote, Cindersford,
    Driftwell, Elderglen, Foxhollow, Gorsefield, Heatherby, Inglethorpe, Jackdawe, Kingfishery, Lanternhouse, Marigolden`),
  known:
    list(`Appledore, Beechwyn, Cloverhill, Dovecote, Embergate, Flintlocke, Greywether, Hazelmount, Ironbarrow, Jasperley,
    Kestrelford, Lavenderby, Meadowsweet, Northwhistle, Orchardene, Pebbleworth`),
  unseen:
    list(`Rookhampton, Silverbirch, Tidewater, Umberlane, Vinecroft, Wolfsbane, Yewtreeve, Ashgrovely, Buttercross, Cuckoofield,
    Damsonby, Elmshadow, Ferncastle, Goosander, Harebelle, Islewright`),
};

const trades =
  list(`Foods, Airways, Motors, Mining, Textiles, Brewing, Robotics, Pharma, Shipping, Paper, Glass, Optics, Dairies, Cement, Rail, Studios,
  Timber, Biotech, Toys, Cycles, Outfitters, Telecom, Solar, Hotels`);

/** Verbs of a figure; each part has its own. */
export const headlineVerbs: Readonly<
  Record<'train' | 'unseen', { readonly up: readonly string[]; readonly down: readonly string[] }>
> = {
  train: {
    up: list(
      'leapt, swelled, mounted, shot up, ticked up, edged higher, rocketed, snowballed, spurted, mushroomed, bounced back, sprinted ahead',
    ),
    down: list(
      'crumbled, withered, dwindled, cratered, nosedived, faded, sagged, buckled, evaporated, receded, caved in, wilted',
    ),
  },
  unseen: {
    up: list('vaulted, skyrocketed, perked up, forged ahead, inched up, flourished, sprang up, powered ahead'),
    down: list('plummeted, ebbed, skidded, shrivelled, subsided, waned, retreated, melted away'),
  },
};

/** Verbs that the templates themselves hold, beside those of figures. */
export const headlineTemplateVerbs: Readonly<Record<'train' | 'unseen', readonly string[]>> = {
  train:
    list(`nabs, trounces, sweetens, fattens, waves through, woos, lightens, forfeits, undershoots, skips, pares, vetoes, forsaken, balloons,
    relocates, webcast, elevates, rebrands, convenes, hands, swaps, converts, graduates`),
  unseen: list('muses, relish, toasts, bemoan, rues, archives, occupies, tends, stows'),
};

type Templates = Readonly<Record<HeadlineLabel, readonly string[]>>;

/** `{hi}` and `{lo}` are amounts with hi > lo, `{V}` is a verb of the part that agrees with the label. */
export const headlineTemplates: Readonly<Record<'train' | 'unseen', Templates>> = {
  train: {
    positive: [
      '{C} {figure} {V} to {hi} from {lo}',
      '{C} {figure} {V} {pct} on {why}',
      '{figure} at {C} {V} as {whyso}',
      '{C} nabs {prize} [worth|valued at] {hi}',
      '{C} trounces forecasts on {why}',
      '{C} stock {V} after {whynews}',
      '{C} [sweetens|fattens] payout after {whynews}',
      '[regulator|watchdog] waves through {C} {thing}',
      '{C} woos {n} [extra|fresh] {clients} on {why}',
      '{C} debt burden lightens to {lo} from {hi}',
    ],
    negative: [
      '{C} {figure} {V} to {lo} from {hi}',
      '{C} {figure} {V} {pct} on {why}',
      '{figure} at {C} {V} as {whyso}',
      '{C} forfeits {prize} [worth|valued at] {hi}',
      '{C} undershoots forecasts on {why}',
      '{C} stock {V} after {whynews}',
      '{C} [skips|pares] payout after {whynews}',
      '[regulator|watchdog] vetoes {C} {thing}',
      '{C} forsaken by {n} {clients} on {why}',
      '{C} debt burden balloons to {hi} from {lo}',
    ],
    neutral: [
      '{C} relocates {seat} to {town}',
      '{C} to webcast {meeting} at {hour} on {weekday}',
      '{C} elevates {person} to {post}',
      '{C} rebrands {thing} arm as {brand}',
      '{C} {figure} steady at {hi} [both years|as in the prior year]',
      '{C} convenes {meeting} in {town}',
      '{C} hands {paper} to the registry in {town}',
      '{C} swaps auditor for {brand} from {month}',
      '{C} converts {n} class A units into class B units',
      '{person} graduates to {post} at {C} in {month}',
    ],
  },
  unseen: {
    positive: [
      '{why} at {C}: {figure} {V} to {hi} against {lo}',
      'how {C} {V}: {why}, muses {person}',
      '{weekday} winners: {C} {V} as {whyso}',
      '{C} clients relish {whynews}',
      '{whyso} and {C} {figure} {V}',
      '{town} toasts {C} for {whynews}',
    ],
    negative: [
      '{why} at {C}: {figure} {V} to {lo} against {hi}',
      'how {C} {V}: {why}, muses {person}',
      '{weekday} losers: {C} {V} as {whyso}',
      '{C} clients bemoan {whynews}',
      '{whyso} and {C} {figure} {V}',
      '{town} rues {C} over {whynews}',
    ],
    neutral: [
      'diary: {C} {meeting}, {town}, {weekday} {hour}',
      'who is who: {person} of {C} occupies {post}',
      '{C} archives {paper} in {town} every {month}',
      'fact box: {C} tends {n} sites near {town}',
      'map: where {C} stows its {seat}',
      '{C} {paper} goes to print in {month}',
    ],
  },
};

const figures = list(
  'profit, sales, quarterly profit, annual sales, orders, half-year profit, revenue, export sales, bookings, underlying profit',
);
type Reasons = Readonly<Record<'why' | 'whyso' | 'whynews', readonly string[]>>;

/** Reasons that share no polar word between the two grammars: what tells them apart must come from pretraining. */
const reasons: Readonly<Record<'train' | 'unseen', Readonly<Record<'positive' | 'negative', Reasons>>>> = {
  train: {
    positive: {
      why: list(
        'strong orders, brisk demand, record orders, higher prices, good weather, new customers, strong exports, lower costs, growing demand',
      ),
      whyso: list(
        'demand improves, orders grow, costs fall, exports rise, new markets open, customers return, markets grow',
      ),
      whynews: list(
        'strong results, a record year, a big order, a better outlook, good news, rising sales, a successful launch',
      ),
    },
    negative: {
      why: list(
        'weak orders, poor demand, lower prices, bad weather, lost customers, weak exports, higher costs, shrinking demand',
      ),
      whyso: list(
        'demand weakens, orders fall, costs rise, exports decline, old markets close, customers leave, markets shrink',
      ),
      whynews: list(
        'weak results, a poor year, a lost order, a worse outlook, bad news, falling sales, a failed launch',
      ),
    },
  },
  unseen: {
    positive: {
      why: list(
        'solid demand, healthy orders, improved efficiency, cost savings, excellent service, a positive trend, increased volumes',
      ),
      whyso: list(
        'deliveries increase, efficiency improves, the recovery continues, volumes increase, profitability improves',
      ),
      whynews: list(
        'excellent figures, a profitable quarter, a promising outlook, an award, a positive report, strong growth',
      ),
    },
    negative: {
      why: list(
        'sluggish demand, a strike, production delays, overcapacity, credit losses, a negative trend, decreased volumes',
      ),
      whyso: list(
        'deliveries decrease, the recession deepens, the strike continues, volumes decrease, profitability weakens',
      ),
      whynews: list(
        'disappointing figures, a loss-making quarter, a gloomy outlook, a fine, a profit warning, heavy losses',
      ),
    },
  },
};
const prizes = list(
  'tram order, bridge order, mail order deal, hospital tender, school tender, harbour tender, army tender, airport lease',
);
const clients = list('subscribers, tenants, club members, account holders, fleet clients, wholesale clients');
const things = list('takeover, drug, reactor, tramway, data hub, loyalty card, pilot plant, toll road');
const seats = list('head office, test track, archive, call desk, paint shop, museum, training site, depot');
const meetings = list(
  'open day, investor tea, owners assembly, budget hearing, technical forum, strategy talk, site tour',
);
const posts = list('audit panel, treasury desk, ethics panel, advisory panel, tax desk, safety desk');
const papers = list('pension report, tax return, site plan, meeting minutes, bylaws, holiday rota, floor plan');
const towns = list(
  'Pinebluff, Marrowgate, Lindenholme, Saltcoats, Crowhurst, Wexcombe, Highmoor, Millbeck, Stonehithe, Redwharf',
);
const surnames = list(
  'Abernethy, Bickerstaff, Culpepper, Dalrymple, Entwhistle, Fothergill, Goodbody, Hathersage, Inchbald, Jellicoe',
);
const initials = list('A., B., D., E., G., H., K., M., R., T.');
const brands = list('Bluefinch, Nimbuzz, Purlwise, Tallyho, Zestiva, Cobaltine');
const weekdays = list('Monday, Tuesday, Wednesday, Thursday, Friday');
const months = list('January, February, March, April, May, June, July, August, September, October, November, December');
const currencies = list('crowns, florins, guilders, ducats');

function headline(random: TextRandom, part: keyof HeadlineParts, label: HeadlineLabel): Headline {
  const grammar = part === 'unseen' ? 'unseen' : 'train';
  const templates = headlineTemplates[grammar][label];
  const template = random.int(0, templates.length - 1);
  const low = random.int(11, 480);
  const high = low + random.int(Math.ceil(low * 0.1), low);
  const unit = `${random.chance(0.8) ? 'million' : 'billion'} ${random.choice(currencies)}`;
  const side = label === 'negative' ? 'negative' : 'positive';
  const slot = (name: string): string => {
    switch (name) {
      case 'C':
        return `${random.choice(headlineCompanies[part])} ${random.choice(trades)}`;
      case 'V':
        return random.choice(headlineVerbs[grammar][label === 'negative' ? 'down' : 'up']);
      case 'hi':
        return `${high} ${unit}`;
      case 'lo':
        return `${low} ${unit}`;
      case 'pct':
        return `${random.int(3, 48)} percent`;
      case 'n':
        return String(random.int(3, 90) * 10);
      case 'why':
      case 'whyso':
      case 'whynews':
        return random.choice(reasons[grammar][side][name]);
      case 'hour':
        return `${random.int(8, 17)}:${random.choice(['00', '15', '30'])}`;
      case 'person':
        return `${random.choice(initials)} ${random.choice(surnames)}`;
      default: {
        const words = plainSlots[name];
        if (words === undefined) throw new RangeError(`headlines: no slot is called {${name}}`);
        return random.choice(words);
      }
    }
  };
  return { text: capitalise(expand(templates[template] as string, random, slot)), label, template };
}

const plainSlots: Readonly<Record<string, readonly string[]>> = {
  figure: figures,
  prize: prizes,
  clients,
  thing: things,
  seat: seats,
  meeting: meetings,
  post: posts,
  paper: papers,
  town: towns,
  brand: brands,
  weekday: weekdays,
  month: months,
};

/**
 * Draws the demo's headlines: no text twice within or across the parts, labels in equal numbers (as far as a size divides by
 * three), order shuffled. The same seed and sizes give the same headlines.
 */
export function demoHeadlines(
  seed: number,
  sizes: { readonly train: number; readonly known: number; readonly unseen: number },
): HeadlineParts {
  const seen = new Set<string>();
  const draw = (part: keyof HeadlineParts): Headline[] => {
    const random = new TextRandom(seed, `headlines ${part}`);
    const out: Headline[] = [];
    for (let i = 0; out.length < sizes[part]; i++) {
      const next = headline(random, part, headlineLabels[out.length % headlineLabels.length] as HeadlineLabel);
      if (!seen.has(next.text)) out.push(next);
      seen.add(next.text);
      if (i > 100 * sizes[part] + 1000)
        throw new RangeError(`headlines: the grammar has no ${sizes[part]} different texts for ${part}`);
    }
    return random.shuffle(out);
  };
  return { train: draw('train'), known: draw('known'), unseen: draw('unseen') };
}
