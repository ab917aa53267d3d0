"""The words that the content policy looks for. Part of the program, not of its configuration.

Plain and clinical on purpose; `models.policy` brings spelling tricks into these forms. A trailing `*` stands
for any ending. Terms are compared in lower case and without accents (ñ stays itself: "nina" is a name). Terms in
scripts without word spaces are searched as substrings.

*Strong* terms say it by themselves; *weak* ones have innocent uses and count only beside a term of the other kind.
"""

from __future__ import annotations


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Words for content that is sexual and shows minors in themselves.
INHERENT = (
    "csam", "jailbait", "lolicon", "shotacon", "pedophil*", "paedophil*", "pedofil*", "padophil*", "педофил*",
    "ロリコン", "ショタコン", "児童ポルノ", "儿童色情", "兒童色情", "아동포르노",
)  # fmt: skip

MINOR_STRONG = (
    # English
    "child", "children", "childs", "toddler*", "infant", "infants", "newborn*", "preschooler*", "kindergart*",
    "preteen*", "pre teen*", "tween", "tweens", "teen", "teens", "teenage", "teenaged", "teenager*", "adolescent*",
    "juvenile*", "pubescent*", "prepubescent*", "underage", "underaged", "under age", "minors", "schoolgirl*",
    "schoolboy*", "schoolchild*", "school girl*", "school boy*", "school child*", "schoolkid*",
    "elementary schooler*", "middle schooler*", "high schooler*", "grade schooler*", "elementary school*",
    "middle school girl*", "middle school boy*", "high school girl*", "high school boy*", "high school student*",
    "junior high*", "girl scout*", "boy scout*", "cub scout*", "little girl*", "little boy*", "small girl*",
    "small boy*", "tiny girl*", "tiny boy*", "young girl*", "young boy*", "young child*", "young kid*",
    "little kid*", "loli", "lolis", "shota", "shotas", "minor aged", "minor age",
    "young looking girl*", "young looking boy*",
    # Spanish
    "niña*", "niño*", "niñit*", "una nina", "un nino", "nina desnud*", "nino desnud*", "nina de", "nino de", "ninas",
    "ninos",
    "menor de edad", "menores de edad", "adolescente*", "colegiala*", "quinceañera*", "quinceanera*",
    # German
    "ein kind", "das kind", "dem kind", "eines kindes", "kindes", "kindern", "kleinkind*", "schulkind*", "kindlich*",
    "kleines kind", "kleine kinder", "die kinder", "zwei kinder", "drei kinder", "kinder spielen",
    "nacktes kind", "nackte kinder", "minderjahrig*", "minderjaehrig*",
    "jugendliche*", "saugling*", "schulerin*", "schuler", "schulmadchen", "kleines madchen", "kleine madchen",
    "junges madchen", "junge madchen", "kleiner junge", "kleine jungen",
    # French
    "enfant", "enfants", "fillette*", "garconnet*", "petite fille", "petites filles", "petit garcon",
    "petits garcons", "mineures", "ecolier*", "ecoliere*", "collegien*", "lyceen*", "gamins",
    # Portuguese
    "crianca*", "menina", "meninas", "menino", "meninos", "menor de idade", "menores de idade", "garotinh*",
    # Italian
    "bambin*", "bimba", "bimbe", "ragazzin*", "minorenn*", "fanciull*", "neonat*",
    # Russian
    "ребенок", "ребенк*", "дети", "детей", "детям", "детьми", "детях", "детск*", "девочк*", "мальчик*", "подрост*",
    "несовершеннолетн*", "школьник*", "школьниц*", "младен*", "малыш*", "малолет*",
    # Japanese
    "子供", "子ども", "こども", "少女", "少年", "幼女", "幼児", "児童", "小学生", "中学生", "高校生", "女子高生",
    "女の子", "男の子", "女児", "男児", "赤ちゃん", "未成年", "園児", "ティーンエイジャー",
    # Chinese
    "儿童", "兒童", "孩子", "小孩", "幼儿", "幼兒", "婴儿", "嬰兒", "小女孩", "小男孩", "小姑娘", "初中生", "高中生",
    "萝莉", "蘿莉", "女童", "男童",
    # Korean
    "어린이", "아이들", "여자아이", "남자아이", "여고생", "남고생", "미성년", "소녀", "소년", "초등학생",
    "중학생", "고등학생", "아동",
)  # fmt: skip

MINOR_WEAK = (
    "kid", "kids", "baby", "babies", "youth", "youths", "childlike", "child like", "childish", "youngster*",
    "minor", "infantile*", "little sister*", "little brother*", "young daughter*", "young son", "my daughter*",
    "his daughter*", "her daughter*", "stepdaughter*", "youthful girl*", "youthful boy*", "age of consent", "barely 18",
    "barely eighteen", "school uniform*", "barely legal", "sweet sixteen", "baby girl", "baby boy",
    "student girl*", "school pupil*",
    "chiquill*", "nena", "nenas", "bebe", "bebes", "madchen", "maedchen", "gamin", "mineur",
    "mineure", "mineurs", "jeune fille", "jeunes filles", "infantil", "colegial", "colegiales", "scolar*",
    "garcon", "garcons", "gamine", "gamines", "ado", "ados", "garota", "garotas", "garoto", "garotos", "menor",
    "menores", "nene", "nenes", "chica", "chicas", "kinder", "mein kind", "jedes kind", "kind nackt", "kind und",
    "kind ist", "kind mit", "kind im", "kind am", "kind auf", "nacktem kind", "nackten kind", "erotisches kind",
    "sexuelles kind", "ein junge", "nackter junge", "jungs", "아이", "아기",
    "дитя", "正太", "ロリ", "ショタ", "女孩", "男孩", "👶", "👧", "👦", "🧒", "🚸",
)  # fmt: skip

SEXUAL_STRONG = (
    # English
    "nude", "nudes", "nudity", "nudist*", "naked", "nakedness", "topless", "unclothed", "sex",
    "sexual", "sexually", "sexuality", "sexualis*", "sexualiz*", "intercourse", "coitus", "coital", "copulat*",
    "erotic*", "porn*", "nsfw", "hentai", "lewd*", "masturbat*", "orgasm*", "ejaculat*", "fellatio", "cunnilingus",
    "sodom*", "genital*", "penis", "penises", "phallus*", "vagina*", "vulva*", "testicle*", "clitor*", "nipple*",
    "areola*", "striptease*", "stripper*", "bdsm", "incest*", "molest*", "rape", "raped", "rapes", "rapist*",
    "prostitut*", "adult film*", "adult video*", "adult content", "without clothes", "without clothing",
    "without any clothes", "without any clothing", "without her clothes", "without his clothes",
    "without their clothes", "no clothes", "no clothing", "wearing nothing", "not wearing anything",
    "not wearing any clothes",
    # Spanish
    "desnud*", "sexo", "sexuales", "erotico*", "erotica*",
    # German
    "nackt*", "sexuell*", "erotisch*", "unbekleidet*", "entblosst*", "geschlechtsverkehr",
    # French
    "nue", "nues", "nudite*", "sexe", "sexuel*", "erotique*", "denude*", "deshabille*",
    # Portuguese
    "nua", "nuas", "nudez", "sexuais",
    # Italian
    "nuda", "nudi", "corpo nudo", "uomo nudo", "ragazzo nudo", "sesso", "sessual*",
    # Russian
    "голая", "голые", "голый", "голую", "голых", "голой", "голым", "голыми", "обнажен*", "нагая", "нагой", "нагие",
    "секс", "секса", "сексуальн*", "порно*", "эроти*", "раздет*",
    # Japanese
    "裸", "ヌード", "性的", "セックス", "ポルノ", "エロい", "エロチック", "エロティック", "わいせつ", "猥褻",
    "性行為", "性器",
    # Chinese
    "色情", "情色", "性爱", "性愛", "性交", "做爱", "做愛", "淫",
    # Korean
    "누드", "나체", "알몸", "섹스", "포르노", "성적인",
)  # fmt: skip

SEXUAL_WEAK = (
    "sexy", "sexier", "sexiest", "seductive*", "seduc*", "sensual*", "provocative*", "suggestive*", "lingerie",
    "panties", "underwear", "negligee", "undress*", "disrob*", "aroused", "arousal", "lust", "lustful*", "kinky",
    "fetish*", "bondage", "brothel*", "uncensored", "explicit content", "explicit scene*", "explicit image*",
    "breast", "breasts", "buttocks", "cleavage",
    "bare chested", "bare bod*", "revealing outfit*", "revealing dress*", "revealing cloth*", "scantily", "adults only",
    "ecchi", "intimate part*", "intimate area*", "xxx", "obscen*", "nudo",
    "nu", "nus", "sensuel*", "seduis*", "unterwasche", "verfuhrerisch*", "sinnlich*", "ropa interior",
    "provocativ*", "sensuale", "соблазн*", "белье", "性感", "セクシー", "下着", "内衣", "섹시", "🔞",
)  # fmt: skip

# Innocent phrases that hold a listed word; they are taken out before anything is looked for.
INNOCENT = (
    "naked eye*", "naked mole rat*", "naked cake*", "naked truth", "naked flame*", "naked bulb*", "naked light bulb*",
    "naked tree*", "naked branch*", "naked blade*", "naked sword*", "naked oat*",
    "nude color*", "nude colour*", "nude tone*", "nude lip*", "nude makeup", "nude make up", "nude palette*",
    "nude heel*", "nude pump", "nude pumps", "nude shoe*", "nude nail*", "nude polish", "nude shade*", "nude beige",
    "nude pink", "nude gloss", "nude stocking*", "nude tight*", "nude background*", "nude fabric*", "nude leather",
    "nude handbag*", "nude bag*", "naked lady lil*",
    "same sex", "opposite sex", "sex ratio*", "sex and the city", "food porn", "foodporn", "topless jeep*",
    "topless car*", "topless bus*", "rape field*", "rape flower*", "rape seed*", "rape blossom*",
    "bottle nipple*", "silicone nipple*", "nipple shield*", "grease nipple*",
    "chicken breast*", "turkey breast*", "duck breast*", "breast cancer", "breast pocket*", "breast plate*",
    "red breast*", "at her breast", "to her breast", "mother s breast", "sex reveal*",
    "child s pose", "inner child", "love child", "wild child", "enfant terrible", "lolita fashion", "sweet lolita",
    "gothic lolita", "juvenile eagle*", "juvenile bird*", "juvenile gull*", "juvenile plumage",
    "ursa minor", "asia minor", "leo minor", "canis minor", "in a minor", "b minor", "c minor", "d minor", "e minor",
    "f minor", "g minor", "sharp minor", "flat minor", "minor key*", "minor chord*", "minor scale*", "minor third*",
    "minor detail*", "minor flaw*", "minor league*", "minor arcana", "minor injur*", "minor damage*", "minor change*",
    "minor road*", "minor character*", "minor role*", "minor imperfection*", "minor planet*", "minor adjust*",
    "minor scratch*", "minor color*", "minor colour*",
    "kid gloves", "kid leather", "baby blue", "baby pink", "baby grand*", "baby s breath", "baby bump*", "baby oil",
    "youth hostel*", "fountain of youth",
    "pies desnudos", "pieds nus", "pied nu", "piedi nudi", "nackte fusse", "nackten fussen", "arbol desnudo",
    "arboles desnudos", "голые дерев*", "голых дерев*", "голые ветв*", "голые ветки", "голыми руками",
    "kinder egg*", "kinder surprise*", "kinder chocolate*", "much ado", "further ado",
    "아이스", "아이디어", "아이콘", "아이폰", "아이돌", "아이섀도", "아이라인", "아이라이너", "아이보리", "아이템",
    "아이슬란드", "아이언", "아이러니", "아기자기",
    "裸足", "裸眼", "裸麦", "裸子植物", "ロリポップ", "カロリー",
)  # fmt: skip

# Whole number words that can state an age, by value; tens are apart because "twenty one" is no "one".
NUMBERS = {
    1: "one uno una eins ein eine un une um uma один",
    2: "two dos zwei deux dois duas due два две",
    3: "three tres drei trois tre три",
    4: "four cuatro vier quatre quatro quattro четыре",
    5: "five cinco funf fuenf cinq cinque пять пяти",
    6: "six seis sechs sei шесть шести",
    7: "seven siete sieben sept sete sette семь семи",
    8: "eight ocho acht huit oito otto восемь восьми",
    9: "nine nueve neun neuf nove девять девяти",
    10: "ten diez zehn dix dez dieci десять десяти",
    11: "eleven once elf onze undici одиннадцать одиннадцати",
    12: "twelve doce zwolf zwoelf douze doze dodici двенадцать двенадцати",
    13: "thirteen trece dreizehn treize treze tredici тринадцать тринадцати",
    14: "fourteen catorce vierzehn quatorze quatorze catorze quattordici четырнадцать четырнадцати",
    15: "fifteen quince funfzehn fuenfzehn quinze quindici пятнадцать пятнадцати",
    16: "sixteen dieciseis sechzehn seize dezesseis dezasseis sedici шестнадцать шестнадцати",
    17: "seventeen diecisiete siebzehn dezessete dezassete diciassette семнадцать семнадцати",
}
TENS = (
    "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety", "hundred", "thousand", "veinte",
    "treinta", "cuarenta", "cincuenta", "sesenta", "setenta", "ochenta", "noventa", "cien", "ciento", "vingt",
    "trente", "quarante", "cinquante", "soixante", "cent", "mille", "vinte", "trinta", "quarenta", "cinquenta",
    "sessenta", "oitenta", "cento", "mil", "venti", "trenta", "quaranta", "hundert", "tausend", "двадцать",
    "тридцать", "сорок", "пятьдесят", "шестьдесят", "сто",
)  # fmt: skip

# Old things that are not people, so that their age is nobody's; never nouns that go before a person's.
AGED_THINGS = _words(
    """oak tree trees pine olive vine bonsai whisky whiskey scotch bourbon rum wine port brandy cognac malt cheese
    barrel cask bottle car truck house building barn castle bridge church temple cathedral cottage mansion ship boat
    lighthouse painting company tradition forest garden wall ruin ruins violin piano guitar sword chair table carpet
    computer laptop vino vinho ron arbol roble wein baum eiche haus vin arbre chene maison arvore albero quercia
    виски вино дуб дерево дом"""
)

# People beside an aged thing: then the age may be theirs after all.
PEOPLE = _words(
    """girl girls boy boys child children kid kids teen teens teenager daughter son sister brother student pupil
    schoolgirl schoolboy model actress actor dancer maid rider virgin female male person human princess niece nephew
    chica chico hija hijo fille garcon tochter sohn figlia figlio девушка дочь"""
)
