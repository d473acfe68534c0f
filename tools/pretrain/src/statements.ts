import { capitalise, expand, TextRandom } from 'lorikeet/demo';
import type { Lexicon, PolarWords } from './lexicon.js';
import {
  downVerbs,
  downVerbsPresent,
  negativeTemplates,
  neutralTemplates,
  positiveTemplates,
  upVerbs,
  upVerbsPresent,
} from './statement-templates.js';

/** What a statement says of its company: better, worse, or neither. */
export type Label = 'negative' | 'neutral' | 'positive';

/** A synthetic financial statement; no data set was copied. */
export interface Statement {
  readonly text: string;
  readonly label: Label;
}

export const labels: readonly Label[] = ['negative', 'neutral', 'positive'];

const words = (text: string): string[] => text.trim().split(/\s*[,\n]\s*/);

const countries =
  words(`Finland, Finland, Finland, Sweden, Norway, Denmark, Estonia, Latvia, Lithuania, Russia, Poland, Germany, France, Italy, Spain, the UK,
  the Netherlands, Belgium, Austria, Switzerland, Hungary, Romania, Ukraine, Turkey, China, China, India, Japan, South Korea, Vietnam, Indonesia,
  Brazil, Mexico, Chile, Peru, the United States, the US, Canada, Australia, South Africa, Egypt, Saudi Arabia, Dubai, Kazakhstan, Bulgaria, Serbia,
  the Czech Republic, Slovakia, Ireland, Portugal, Greece, Malaysia, Thailand, Singapore, Hong Kong, Taiwan, Argentina, Belarus, Iceland`);
const regions =
  words(`the Baltic countries, the Nordic countries, Scandinavia, Central Europe, Eastern Europe, Europe, Asia, Latin America, North America,
  the Middle East, southern Finland, northern Sweden, the Baltic Sea region, the St Petersburg region, the home market, Africa, South America, the Far East`);
const cities =
  words(`Helsinki, Helsinki, Espoo, Tampere, Turku, Oulu, Vantaa, Lahti, Vaasa, Kuopio, Pori, Kotka, Stockholm, Gothenburg, Oslo, Bergen, Copenhagen,
  Tallinn, Riga, Vilnius, St Petersburg, Moscow, Warsaw, Berlin, Hamburg, Munich, Paris, Lyon, London, Manchester, Amsterdam, Brussels, Vienna, Zurich,
  Budapest, Prague, Madrid, Milan, Shanghai, Beijing, Mumbai, Chennai, Tokyo, Seoul, New York, Chicago, Boston, Houston, Toronto, Sydney, Kiev`);
const nations = words(
  'Finnish, Finnish, Finnish, Swedish, Norwegian, Danish, Estonian, German, Russian, American, US, British, Chinese, Indian, Dutch, French, Latvian, Lithuanian, Polish, Japanese',
);
const sectors =
  words(`paper, steel, engineering, construction, retail, food, software, telecommunications, media, shipping, banking, insurance, energy, chemicals,
  forest, packaging, electronics, real estate, property, machinery, mining, brewing, publishing, furniture, textile, pharmaceutical, health care, transport,
  logistics, airline, tourism, IT services, consulting, fishing, dairy, meat, sports equipment, automation, metals, mobile phone, internet, wood products,
  lift, boat, printing, education, environmental services, staffing, security, biotechnology, glass, plastics, oil, gas, electricity, forestry`);
const plainProducts =
  words(`paper machines, cranes, ships, engines, valves, pumps, boilers, elevators, tractors, harvesters, cables, base stations, mobile phones,
  handsets, software, networks, network equipment, servers, broadband services, mobile services, data systems, games, maps, navigation devices, tyres, cars,
  buses, trucks, ferries, cruise ships, aircraft parts, bricks, windows, doors, houses, apartments, offices, steel, stainless steel, copper, zinc, nickel,
  pulp, paper, board, packaging, labels, plywood, sawn timber, biofuel, diesel, wind turbines, power plants, transformers, drives, frequency converters,
  tools, knives, scissors, furniture, textiles, clothes, shoes, watches, sports equipment, skis, boats, beer, cider, soft drinks, mineral water, bread, meat,
  cheese, sausages, fish, coffee, sweets, magazines, newspapers, books, advertising, insurance, loans, funds, banking services, payment systems, leasing,
  consulting services, training, security systems, locks, medicines, vaccines, diagnostics, dental equipment, hospital services, cleaning services, waste
  management, recycling, maintenance services, IT services, outsourcing, staffing services, catering, hotels, travel services, freight, parcels, warehouses,
  rental machines, automation systems, sensors, measuring instruments, weather stations, optical fibre, antennas, chips, silicon wafers, components, circuit
  boards, plastic parts, moulds, coatings, paints, chemicals, fertilisers, grain, eggs, flowers, heating systems, pipes, ventilation, air conditioning, filters`);
const occupations =
  words(`engineers, nurses, teachers, drivers, welders, designers, doctors, farmers, students, pensioners, builders, researchers, lawyers, accountants,
  journalists, pilots, sailors, clerks, salespeople, consultants, programmers, children, families, tourists, households, dealers, importers, wholesalers,
  shopkeepers, architects, electricians, plumbers, painters, carpenters, dentists, librarians, photographers, musicians, athletes, officials`);
const roles =
  words(`CEO, CEO, chief executive officer, managing director, president and CEO, president, CFO, chief financial officer, chairman, chairman of the board, director,
  sales director, marketing director, vice president, senior vice president, executive vice president, spokesman, head of investor relations, production manager,
  country manager, project manager, analyst, deputy managing director, board member, chief technology officer, head of communications, plant manager`);
const firstNames =
  words(`Matti, Juha, Timo, Kari, Mika, Antti, Jukka, Pekka, Hannu, Petri, Anna, Maria, Liisa, Sari, Tiina, Outi, Leena, Lars, Anders, Erik, Johan, Karin, Ingrid, Nils,
  Jens, Sven, Olga, Igor, Dmitri, Elena, Sergei, John, David, Peter, Paul, Mark, Susan, Mary, Karen, James, Robert, Michael, Thomas, Wei, Hiroshi, Yuki, Ravi, Anil, Priya, Juan, Carlos,
  Marek, Piotr, Janis, Tomas, Helena, Kaisa, Ville, Risto, Heikki, Esa, Ari, Jari, Tero, Kimmo, Hans, Klaus, Pierre, Luc`);
const surnameStarts = words(
  'Koiv, Lehto, Saar, Tamm, Vuor, Kallio, Niem, Ranta, Halo, Pelt, Suom, Hirv, Lind, Berg, Sund, Holm, Dahl, Wester, Ny, Ek, Hart, Ash, Carl, Wood, Brad, Marsh, Petr, Iv, Sokol, Yam, Tana, Sing, Gup',
);
const surnameEnds = words(
  'inen, la, nen, maa, sto, ola, ikko, ström, berg, man, qvist, gren, lund, sson, sen, ton, ley, field, ov, enko, sky, ada, moto, ka, h, ta',
);
const companyStarts =
  words(`Vant, Kor, Sal, Tar, Lum, Nor, Hal, Mer, Pol, Ruk, Tel, Sor, Val, Fin, Bal, Ost, Vest, Gran, Stor, Lin, Kes, Rau, Uton, Aho, Elko, Ilm, Jar, Myl, Orv, Pyh, Sav, Tyr, Vir, Dyn,
  Tec, Net, Med, Bio, Agro, Eco, Omni, Trans, Inter, Euro, Glob, Alp, Cent, Prim, Nov, Sig, Vect, Arc, Del, Hex, Quan, Zen, Kyo, Han, Shin, Tai, Jin, Bra, Cre, Dor, Fer, Gal, Ker, Mar, Pan, Ros, Ster, Ulv`);
const companyMiddles = words('a, e, i, o, , , ta, li, ma, ri, no, ve, ko, si');
const companyEnds =
  words(`ra, tek, mark, nor, lux, met, com, soft, ia, ex, is, on, um, la, nen, sto, pap, pak, wood, steel, bank, tel, med, pharm, gen, net, data, ware, sys, line, port, trans, mar, shipping, foods, energi,
  hus, bygg, kraft, dyne, max, tron, ics, ent, ora, anta, iva, ello, uma, ikka, oil, cap, fund, vest, rix, gard`);
const nordicForms = words('Oyj, Oyj, Oy, Corporation, Corp, Group, Plc, AB, ASA, A/S, AS, Oyj Abp, OY, Group Plc');
const otherForms = words(
  'Inc, Inc., Corp., Ltd, Ltd., LLC, Holdings, GmbH, AG, SA, NV, SpA, Co, Co., Group, OAO, ZAO, UAB, SIA, Pvt Ltd, Industries, International, Partners, Bank, Technologies',
);
const months = words(
  'January, February, March, April, May, June, July, August, September, October, November, December',
);
const days = words('Monday, Tuesday, Wednesday, Thursday, Friday');
const quarters = words('first, second, third, fourth');
const metrics =
  words(`operating profit, operating profit, operating profit, net sales, net sales, net sales, net profit, net profit, sales, sales, turnover, revenue, profit before taxes, pretax profit,
  pre-tax profit, profit, profit for the period, EBIT, EBITDA, operating income, net income, net interest income, order intake, orders received, earnings, export sales, gross profit, advertising sales, service sales,
  commission income, premium income, comparable operating profit, like-for-like sales, rental income, passenger traffic revenue, cash flow from operations, operating result, international sales, retail sales,
  license sales, interest income, fee income, value of orders, result before taxes`);
const growthAdverbs = words(
  'sharply, slightly, clearly, significantly, considerably, strongly, markedly, substantially, rapidly, somewhat, steadily, notably, a little, by more than a tenth, further',
);
const topics =
  words(`outlook, result, report, strategy, market situation, product, plan, management, performance, order situation, service, deal, price, position, development, cooperation, launch, quality,
  financial position, year, quarter, business, investment, growth, sales work, start of the year, restructuring, acquisition, cash position, decision, system, technology, project, brand, demand, offer,
  profitability, customer base, pricing, delivery, expansion, trend, forecast, response, partnership, network, environment, competition, staff, policy`);
const events = words(
  'merger, launch, report, deal, acquisition, decision, meeting, agreement, year, quarter, announcement, share issue, project, investment, trial, campaign, visit, fair, reorganisation, change of owner, ruling',
);
const people = words(
  'investors, customers, shareholders, employees, analysts, users, suppliers, the market, owners, partners, the staff, the board, the unions, consumers, the authorities, the press, clients, creditors, banks, experts',
);
const goodFeelings = words(
  'happy, satisfied, pleased, delighted, confident, optimistic, excited, enthusiastic, impressed, thrilled',
);
const badFeelings = words(
  'unhappy, dissatisfied, disappointed, worried, concerned, pessimistic, angry, anxious, frustrated, alarmed',
);
const goodCauses =
  words(`strong demand, good demand, higher prices, higher volumes, growth in {place}, lower costs, improved efficiency, cost savings, new orders, brisk sales of {products}, the acquisition of {c2}, good sales in {place},
  a favourable product mix, higher deliveries, strong growth in {sector}, a recovery in {place}, new customers, successful {products}, improved profitability, the weak euro, record sales of {products}, {good} {topic}, increased exports, a capital gain, economic growth, better capacity utilisation`);
const badCauses =
  words(`weak demand, poor demand, lower prices, lower volumes, the recession, higher costs, rising raw material prices, the economic crisis, tough competition, falling sales of {products}, a strike, weak sales in {place},
  delays, overcapacity, the strong euro, restructuring costs, write-downs, credit losses, price pressure, a fall in {sector}, the slowdown in {place}, lost customers, delivery problems, one-off costs, {bad} {topic}, declining exports, poor weather, fewer orders, the financial crisis, declining demand, a lack of orders`);
const goodAdjectives = words(
  `strong, good, excellent, better than expected, promising, solid, successful, impressive, positive, favourable, healthy, encouraging, satisfactory, profitable, robust, attractive, competitive, stable and growing, bright, record, improved, outstanding, efficient, high, valuable, reliable, popular, innovative, well managed`,
);
const badAdjectives = words(
  `weak, poor, bad, worse than expected, disappointing, difficult, unsuccessful, negative, unfavourable, unsatisfactory, unprofitable, sluggish, gloomy, uncertain, challenging, low, worrying, expensive, slow, loss-making, soft, lacklustre, tough, vulnerable, deteriorating, unclear, outdated, inefficient, problematic`,
);
const doublingVerbs = words(
  'more than doubled, doubled, almost tripled, more than tripled, multiplied, nearly doubled, was twice as high and rose',
);
const halvingVerbs = words(
  'more than halved, halved, almost halved, dropped by more than half, fell to less than half, collapsed',
);
const indices = words(
  'OMX Helsinki, OMX Nordic 40, Dow Jones, Nasdaq, FTSE 100, DAX, Nikkei, mid-cap, all-share, weighted, portfolio',
);
const brokers = words('Bank, Securities, Markets, Capital, Equities, Research');

interface Money {
  readonly high: string;
  readonly low: string;
  /** The change in percent of the low amount and of the high amount. */
  readonly rise: number;
  readonly fall: number;
}

/** A number as news writes it, between `from` and `to` on a logarithmic scale. */
function magnitude(random: TextRandom, from: number, to: number): number {
  const value = Math.exp(Math.log(from) + random.uniform() * Math.log(to / from));
  return Number(
    value.toFixed(value < 20 ? (random.chance(0.85) ? 1 : 2) : value < 200 ? (random.chance(0.6) ? 1 : 0) : 0),
  );
}

function thousands(value: number): string {
  const [whole = '', fraction] = String(value).split('.');
  const grouped = whole.replace(/\B(?=(\d{3})+$)/g, ',');
  return fraction === undefined ? grouped : `${grouped}.${fraction}`;
}

const unitsOf: Readonly<Record<string, readonly string[]>> = {
  million: ['mn', 'mn', 'm', 'mln', 'million', 'million'],
  billion: ['bn', 'billion', 'bln'],
};

/** One way to write amounts, kept through a statement: currency, unit, spacing. */
function moneyStyle(random: TextRandom): (value: number) => string {
  const currency = random.choice([
    'EUR',
    'EUR',
    'EUR',
    'EUR',
    'EUR',
    'euro',
    'USD',
    '$',
    '$',
    'SEK',
    'NOK',
    'DKK',
    'RUB',
    'GBP',
    'EEK',
    'LVL',
    'INR',
    'JPY',
    'CNY',
  ]);
  const size = random.choice(['million', 'million', 'million', 'billion', 'thousand']);
  const unit = random.choice(unitsOf[size] ?? ['']);
  const glued = random.chance(0.3);
  // A wire's habit: the amount again in dollars.
  const dollars = currency === 'euro' && random.chance(0.6) ? 1.2 + random.uniform() * 0.3 : 0;
  return (value) => {
    const number = thousands(size === 'thousand' ? Math.round(value * 1000) : value);
    if (currency === 'euro') {
      const other = size === 'thousand' ? Math.round(value * 1000 * dollars) : Number((value * dollars).toFixed(1));
      const converted = dollars === 0 ? '' : ` ($${glued ? '' : ' '}${thousands(other)} ${unit})`;
      return `${number} ${unit} euro${random.chance(0.3) ? 's' : ''}${converted}`;
    }
    if (currency === '$') return `$${glued ? '' : ' '}${number} ${unit}`;
    return glued
      ? `${currency}${number}${unit === 'm' || unit === 'bn' ? '' : ' '}${unit}`
      : `${currency} ${number} ${unit}`;
  };
}

function plural(noun: string): string {
  if (/(?:s|x|z|ch|sh)$/.test(noun)) return `${noun}es`;
  if (/[^aeiou]y$/.test(noun)) return `${noun.slice(0, -1)}ies`;
  if (noun.endsWith('man')) return `${noun.slice(0, -3)}men`;
  return `${noun}s`;
}

function companyName(random: TextRandom): string {
  const name = capitalise(
    `${random.choice(companyStarts)}${random.choice(companyMiddles)}${random.choice(companyEnds)}`.toLowerCase(),
  );
  return random.chance(0.06) ? name.slice(0, 4).toUpperCase() : name;
}

function personName(random: TextRandom): string {
  return `${random.choice(firstNames)} ${random.choice(surnameStarts)}${random.choice(surnameEnds)}`;
}

/** Fills the slots of one statement; what is drawn once (company, year, amounts) stays the same through it. */
function slotFiller(random: TextRandom, lexicon: Lexicon, label: Label): (name: string) => string {
  const once = new Map<string, string>();
  const keep = (key: string, make: () => string): string => {
    const known = once.get(key);
    if (known !== undefined) return known;
    const made = make();
    once.set(key, made);
    return made;
  };
  const year = random.int(2001, 2024);
  const style = moneyStyle(random);
  let ratio: [number, number] | undefined;
  let pair: Money | undefined;
  const money = (): Money => {
    if (pair !== undefined) return pair;
    const low = magnitude(random, 0.2, 900);
    const [from, to] = ratio ?? (random.chance(0.75) ? [1.02, 1.6] : [1.6, 4]);
    let high = Number((low * (from + random.uniform() * (to - from))).toFixed(low < 200 ? 1 : 0));
    if (high <= low * (ratio === undefined ? 1 : from))
      high = Number((low * from + (low < 200 ? 0.1 : 1)).toFixed(low < 200 ? 1 : 0));
    pair = { high: style(high), low: style(low), rise: (high / low - 1) * 100, fall: (1 - low / high) * 100 };
    return pair;
  };
  const percent = (value: number): string => {
    const text =
      value < 0.05
        ? '0.1'
        : value >= 100 || random.chance(0.4)
          ? String(Math.max(1, Math.round(value)))
          : value.toFixed(1);
    return `${text}${keep('percent', () => random.choice(['%', '%', '%', ' percent', ' per cent', ' pct']))}`;
  };
  /** Two numbers, the first the greater, written alike. */
  const pairOf = (key: string, make: () => [number, number], write: (value: number) => string): [string, string] => {
    const high = once.get(`${key}hi`);
    const low = once.get(`${key}lo`);
    if (high !== undefined && low !== undefined) return [high, low];
    const [x, y] = make();
    once.set(`${key}hi`, write(x));
    once.set(`${key}lo`, write(y));
    return [write(x), write(y)];
  };
  const perShare = (value: number): string =>
    `${keep('eps', () => random.choice(['EUR ', 'EUR', 'EUR ', 'USD ', '$', 'SEK ']))}${value.toFixed(2)}`;
  const polar = (wanted: Label): { words: PolarWords; adjectives: readonly string[] } =>
    wanted === 'positive'
      ? { words: lexicon.good, adjectives: goodAdjectives }
      : { words: lexicon.bad, adjectives: badAdjectives };
  const describe = (sentence: boolean): string => {
    const name = keep('company', () => companyName(random));
    const nordic = keep('nordic', () => (random.chance(0.7) ? 'y' : 'n')) === 'y';
    const full = `${name} ${random.choice(nordic ? nordicForms : otherForms)}`;
    const ticker = random.chance(0.35)
      ? ` (${random.choice(['HEL', 'OMX Helsinki', 'HEL', 'STO', 'NYSE', 'Nasdaq'])}: ${name.slice(0, 3).toUpperCase()}${random.choice(['1V', 'AS', 'BV', '', 'V'])})`
      : '';
    return random.choice([
      name,
      name,
      name,
      full,
      full,
      `${full}${ticker}`,
      sentence
        ? `${random.choice(nations)} ${slot('sector')} ${random.choice(['company', 'group', 'firm', 'giant', 'business', 'maker'])} ${full}${ticker}`
        : name,
      sentence ? `${slot('sector')} ${random.choice(['company', 'group', 'firm'])} ${name}` : name,
      sentence ? 'the company' : name,
      sentence ? 'the group' : name,
    ]);
  };

  const slot = (name: string): string => {
    const base = name.replace(/\d$/, '');
    switch (name) {
      case 'C':
        return describe(true);
      case 'c':
        return random.choice([
          keep('company', () => companyName(random)),
          keep('company', () => companyName(random)),
          'the company',
          'the group',
        ]);
      case 'c2':
      case 'c3':
        return keep(
          name,
          () =>
            `${companyName(random)}${random.chance(0.5) ? ` ${random.choice(random.chance(0.5) ? nordicForms : otherForms)}` : ''}`,
        );
      case 'broker':
        return keep(name, () => `${companyName(random)} ${random.choice(brokers)}`);
      case 'up':
        return random.choice(upVerbs);
      case 'down':
        return random.choice(downVerbs);
      case 'upp':
        return random.choice(upVerbsPresent);
      case 'downp':
        return random.choice(downVerbsPresent);
      case 'up2': {
        const verb = random.choice(doublingVerbs);
        ratio = verb.includes('tripl')
          ? verb.startsWith('almost')
            ? [2.75, 2.98]
            : [3.05, 4]
          : verb.startsWith('nearly')
            ? [1.85, 1.98]
            : verb === 'multiplied'
              ? [3, 6]
              : [2.02, 2.6];
        return verb;
      }
      case 'down2': {
        const verb = random.choice(halvingVerbs);
        ratio = verb.startsWith('almost') ? [1.85, 1.98] : verb === 'collapsed' ? [3, 6] : [2.05, 3];
        return verb;
      }
      case 'hi':
        return money().high;
      case 'lo':
        return money().low;
      case 'm':
      case 'm2':
        return style(magnitude(random, 0.3, 900));
      case 'msmall':
        return `${random.choice(['EUR ', 'EUR', '$', 'USD '])}${thousands(random.int(2, 400) * random.choice([5, 50, 100]))}`;
      case 'pct':
        return percent(label === 'negative' ? money().fall : money().rise);
      case 'pctshare':
        return percent(0.5 + random.uniform() * 94);
      case 'pctsmall':
        return percent(0.1 + random.uniform() * 6);
      case 'pcthi':
      case 'pctlo': {
        const [high, low] = pairOf(
          'pct',
          () => {
            const low = magnitude(random, 2, 40);
            return [Number((low + 0.5 + random.uniform() * low).toFixed(1)), low];
          },
          (x) => `${x}${keep('percent', () => random.choice(['%', '%', ' percent', ' pct']))}`,
        );
        return name === 'pcthi' ? high : low;
      }
      case 'epshi':
      case 'epslo':
      case 'hishare':
      case 'loshare': {
        const [high, low] = pairOf(
          'eps',
          () => {
            const low = random.int(1, base.includes('eps') ? 190 : 4000) / 100;
            return [low + random.int(1, 80) / 100, low];
          },
          perShare,
        );
        return name.includes('hi') && name !== 'loshare' ? high : low;
      }
      case 'counthi':
      case 'countlo': {
        const [high, low] = pairOf(
          'count',
          () => {
            const low = random.int(2, 900) * random.choice([10, 100, 1000, 10000]);
            return [Math.round(low * (1.03 + random.uniform() * 0.6)), low];
          },
          thousands,
        );
        return name === 'counthi' ? high : low;
      }
      case 'count':
        return thousands(
          random.int(2, 999) * random.choice([1, 10, 100, 1000, 10000]) + random.choice([0, 0, 0, random.int(0, 99)]),
        );
      case 'points':
        return thousands(Number((500 + random.uniform() * 12000).toFixed(2)));
      case 'share':
        return perShare(random.int(50, 6000) / 100);
      case 'n':
        return String(random.chance(0.5) ? random.int(2, 90) : random.int(2, 99) * 10);
      case 'n2':
        return random.choice(['two', 'three', 'four', 'five', 'six', 'seven', 'eight', 'ten', '12', '15', '20', '30']);
      case 'age':
        return String(random.int(31, 64));
      case 'time':
        return random.choice(['9.00 am', '8:30', '10 a.m.', '14.00', '12 noon', '3 pm']);
      case 'day':
        return `${random.choice(days)}${random.chance(0.25) ? ` (${random.int(1, 28)} ${random.choice(months)})` : ''}`;
      case 'month':
      case 'month2':
        return random.choice(months);
      case 'date':
        return random.chance(0.6)
          ? `${random.int(1, 28)} ${random.choice(months)}${random.chance(0.6) ? ` ${year + 1}` : ''}`
          : `${random.choice(months)} ${random.int(1, 28)}${random.chance(0.5) ? `, ${year + 1}` : ''}`;
      case 'year':
        return String(year);
      case 'prevyear':
        return String(year - 1);
      case 'oldyear':
        return String(random.int(1880, 2000));
      case 'quarterword':
        return keep(name, () => random.choice(quarters));
      case 'quarter':
        return `${random.choice(['Q1', 'Q2', 'Q3', 'Q4', 'H1', '9-mo', 'FY'])}`;
      case 'period':
        return expand(
          random.choice([
            'in the {quarterword} quarter',
            'in the {quarterword} quarter of {year}',
            'for the {quarterword} quarter',
            'in {year}',
            'in {year}',
            'for {year}',
            'in January-[March|June|September|December]',
            'in January-[June|September] {year}',
            'in the [first half|second half] of {year}',
            'in the [first|last] [three|six|nine|twelve] months of {year}',
            'for the [three|six|nine] months ended {month} {n30}',
            'in [Q1|Q2|Q3|Q4] {year}',
            'in {month}',
            'in {month} {year}',
            'in the financial year {year}',
            'last year',
            'during the review period',
            'in the reporting period',
            'in [April-June|July-September|October-December]',
            'this year',
            'in the [spring|summer|autumn|winter]',
            'in the period',
          ]),
          random,
          slot,
        );
      case 'n30':
        return random.choice(['30', '31']);
      case 'prior':
        return expand(
          random.choice([
            'a year earlier',
            'a year ago',
            'a year before',
            'the year before',
            'in {prevyear}',
            'in the corresponding period of {prevyear}',
            'in the same period of {prevyear}',
            'in the corresponding period last year',
            'in the comparison period',
            'last year',
            'in the previous year',
            'the previous year',
            'in the {quarterword} quarter of {prevyear}',
            'for {prevyear}',
            'for the same period a year earlier',
            'in the year-ago period',
            'in the previous quarter',
            'for the corresponding period in {prevyear}',
          ]),
          random,
          slot,
        );
      case 'prior2':
        return random.choice([
          'year-on-year',
          'on the year',
          'from a year earlier',
          'from the previous year',
          'compared with the previous year',
          'over the year',
        ]);
      case 'country':
        return random.choice(countries);
      case 'nation':
        return random.choice(nations);
      case 'place':
      case 'place2':
      case 'place3':
        return random.chance(0.35)
          ? random.choice(countries)
          : random.chance(0.5)
            ? random.choice(cities)
            : random.chance(0.35)
              ? random.choice(regions)
              : random.choice(lexicon.towns);
      case 'sector':
        return random.choice(sectors);
      case 'product':
        return random.chance(0.6)
          ? keep('thing', () => String(random.int(0, lexicon.things.length - 1))) && thing().name
          : random.choice(sectors) +
              random.choice([' system', ' service', ' product', ' machine', ' line', ' solution', ' platform']);
      case 'products':
      case 'products2':
      case 'products3':
        return random.chance(0.55)
          ? random.choice(plainProducts)
          : random.chance(0.75)
            ? plural(random.choice(lexicon.things).name)
            : random.choice(lexicon.materials);
      case 'gloss':
      case 'gloss2':
      case 'gloss3':
        return name === 'gloss' ? thing().definition : random.choice(lexicon.things).definition;
      case 'occupations':
      case 'occupations2':
        return random.choice(occupations);
      case 'person':
      case 'person2':
      case 'person3':
        return keep(name, () =>
          random.chance(0.12) ? `Mr ${personName(random).split(' ')[1] ?? ''}` : personName(random),
        );
      case 'role':
        return random.choice(roles);
      case 'smetric':
        return random.choice(metrics);
      case 'metric': {
        const metric = random.choice(metrics);
        return random.choice([
          metric,
          metric,
          metric,
          `the company's ${metric}`,
          `${slot('c')}'s ${metric}`,
          `${slot('C')}'s ${metric}`,
          `its ${metric}`,
          `the group's ${metric}`,
          `consolidated ${metric}`,
          `${metric} of the ${slot('sector')} unit`,
          `the ${slot('sector')} division's ${metric}`,
          `${metric} in ${slot('place')}`,
          `${metric} from ${slot('products')}`,
          `total ${metric}`,
        ]);
      }
      case 'index':
        return random.choice(indices);
      case 'adv':
        return random.choice(growthAdverbs);
      case 'adjup':
        return random.choice(['higher', 'growing', 'record', 'improved', 'a clear rise in', 'better than expected']);
      case 'adjdown':
        return random.choice(['lower', 'falling', 'weaker', 'a clear fall in', 'worse than expected', 'shrinking']);
      case 'topic':
        return random.choice(topics);
      case 'event':
        return random.choice(events);
      case 'people':
        return random.choice(people);
      case 'goodcause':
        return expand(random.choice(goodCauses), random, slot);
      case 'badcause':
        return expand(random.choice(badCauses), random, slot);
      case 'goodfeel':
        return random.choice(goodFeelings);
      case 'badfeel':
        return random.choice(badFeelings);
      case 'good':
      case 'bad': {
        const { words: list, adjectives } = polar(name === 'good' ? 'positive' : 'negative');
        return random.chance(0.5) ? random.choice(adjectives) : random.choice(list.adjectives);
      }
      case 'goodn':
        return random.choice(lexicon.good.nouns);
      case 'badn':
        return random.choice(lexicon.bad.nouns);
      case 'goodv':
        return random.choice(lexicon.good.participles);
      case 'badv':
        return random.choice(lexicon.bad.participles);
      case 'dateline':
        return expand(
          `[(${companyName(random)} News) - |]${random.choice(months).slice(0, 3)} ${random.int(1, 28)}, {year} -`,
          random,
          slot,
        );
      default:
        throw new RangeError(`statements: no slot is called {${name}}`);
    }
  };
  const thing = (): { name: string; definition: string } =>
    lexicon.things[Number(keep('thing', () => String(random.int(0, lexicon.things.length - 1))))] as {
      name: string;
      definition: string;
    };
  return slot;
}

const templatesOf: Record<Label, readonly string[]> = {
  negative: negativeTemplates,
  neutral: neutralTemplates,
  positive: positiveTemplates,
};

/** Share of the neutral sentences that are not of business at all. */
const plainShare = 0.25;

/** Labels take turns in this ratio: most news has no verdict, and bad news is the rarest. */
const turns: readonly Label[] = [
  ...Array<Label>(6).fill('neutral'),
  ...Array<Label>(5).fill('positive'),
  ...Array<Label>(4).fill('negative'),
];

/** One sentence in plain prose, with capital and full stop. */
function sentence(random: TextRandom, lexicon: Lexicon, label: Label): string {
  if (label === 'neutral' && random.chance(plainShare)) return random.choice(lexicon.plainSentences);
  const template = random.choice(templatesOf[label]);
  const text = expand(template, random, slotFiller(random, lexicon, label));
  return capitalise(
    text
      .replace(/\ba~ (?=8|11\b|18\b|[aeio])/gi, 'an ')
      .replace(/\ba~ /gi, 'a ')
      .replace(/\[?\ba\|an\b\]?/g, 'a')
      .replace(/\b([Aa]) (?=[aeio][a-z])/g, '$1n ')
      .replace(/\b([Aa])n (?=[bcdfgjklmnpqrstvwxyz][a-z])/g, '$1 ')
      .replace(/ +([,.;?])/g, '$1')
      .replace(/,(?:,|\.)/g, (pair) => (pair === ',.' ? '.' : ','))
      .replace(/\.\./g, '.')
      .replace(/ {2,}/g, ' '),
  );
}

/** Puts spaces round punctuation as old news corpora have them. */
export function tokenised(text: string, random: TextRandom): string {
  const glueQuirk = random.chance(0.1);
  return text
    .replace(/(^|\s)"/g, '$1`` ')
    .replace(/"/g, " ''")
    .replace(/([A-Za-z])'s\b/g, "$1 's")
    .replace(/s'(?= )/g, "s '")
    .replace(/(\d)%/g, '$1 %')
    .replace(/\$(?=\d)/g, '$ ')
    .replace(/([()])/g, ' $1 ')
    .replace(/:(?= |$)/g, ' :')
    .replace(/,(?= )/g, ' ,')
    .replace(/([?;])/g, ' $1')
    .replace(/([A-Z]{3}\d+)\.(\d)/g, glueQuirk ? '$1 .$2' : '$1.$2')
    .replace(/\.(?= ''|$)/g, ' .')
    .replace(/ {2,}/g, ' ')
    .trim();
}

/** Share of the single sentences that are written as headlines are. */
const terseShare = 0.2;

/** A sentence as a headline: without articles, forms of "be" and a full stop. */
function terse(text: string): string {
  return capitalise(
    text
      .replace(/\.$/, '')
      .replace(/\b(?:the|a|an|its|will be|was|were|is|are|has been|have been) (?=[a-z])/gi, '')
      .replace(/ {2,}/g, ' '),
  );
}

/** Draws one labelled statement. */
export function statement(random: TextRandom, lexicon: Lexicon, label: Label): Statement {
  const parts = [sentence(random, lexicon, label)];
  // A fact beside the news does not change what the news says.
  if (random.chance(0.12))
    parts.splice(random.int(0, 1), 0, sentence(random, lexicon, random.chance(0.7) ? 'neutral' : label));
  let text = parts.join(' ');
  if (parts.length === 1 && random.chance(terseShare)) return { text: terse(text), label };
  if (random.chance(0.75)) text = parts.map((part) => tokenised(part, random)).join(' ');
  if (random.chance(0.05)) text = text.toLowerCase();
  else if (random.chance(0.08)) text = text.replace(/ ?\.$/, '');
  return { text, label };
}

/** `count` statements, of every 15 six neutral, five positive and four negative, shuffled within each 15. */
export function statements(count: number, seed: number, lexicon: Lexicon): Statement[] {
  const random = new TextRandom(seed, 'statements');
  const out: Statement[] = [];
  while (out.length < count)
    for (const label of random.shuffle([...turns])) out.push(statement(random, lexicon, label));
  return out.slice(0, count);
}
