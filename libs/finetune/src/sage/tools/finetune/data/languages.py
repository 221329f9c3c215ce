"""The languages written in encodings of one byte a character, and those encodings."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple


class Language(NamedTuple):
    letters: str
    """Beyond ASCII, small, in the order of how often they come."""
    words: str = ""
    """Frequent ones that are all ASCII: where few other letters are, these tell what language it is."""


_ALBANIAN = Language("ëç", "dhe nuk me kjo nga duhet ose ju ky si ka ta do jepni emri mund jo pa")
_ESTONIAN = Language("äõüöšž", "ei ja see mis kui peab selle ole oma ning et kas saab palun mida kuidas")
_GERMAN = Language(
    "üäöß", "der das und ist nicht ein eine zu den von mit wird wie werden sie bitte dem auf oder ich kann"
)
_ENGLISH = Language(
    "éñöüàïçãèêåäáßóíúøôëîâæûœš", "the of and is how to what for not are with you this it be can"
)
_WESTERN = (
    _ENGLISH,
    _GERMAN,
    _ALBANIAN,
    _ESTONIAN,
    Language(  # Finnish
        "äö",
        "ei ja se ole tai kun voi olla oli sen ovat mutta on anna tulee tiedosto miten sinun",
    ),
    Language(  # French
        "éèàêçôûîâùïëœ",
        "le la les des une est pas du vous dans pour que qui sur un de votre cette comment avec ou en et au",
    ),
    Language(  # Spanish
        "óíáéñúü",
        "el la los las una es que por del se un para con de en lo su este como puede al esta ser",
    ),
    Language(  # Portuguese
        "ãçáéíóõêúâàô",
        "os uma um que com para por se da ser em na de seu sua no do esta este como pode ao dos",
    ),
    Language(  # Italian
        "àèùòéì",
        "il di un una non per che del la deve con sono questo dei si come al da le questa",
    ),
    Language(  # Catalan
        "àéèíóòçïúü",
        "el la els les un una de que amb per del no se ha aquest si com pot al aquesta",
    ),
    Language(  # Swedish
        "äåöé",
        "och att det inte som av en ett kan till med den du om har hur ska eller detta",
    ),
    Language(  # Danish, Norwegian
        "øåæé",
        "og det ikke som av en et til er med den der skal kan af du om har hvordan denne fra eller",
    ),
    Language("íáðéþúöæóý", "og er ekki til fyrir sem um hefur eru eitt hvernig vera"),  # Icelandic
    Language("áíéóú", "an ar na agus go le den nach bheith seo ag is do sa chun"),  # Irish
    Language("ëéï", "het een van niet dat voor zijn met wordt deze moet en de op er uw hoe kan"),  # Dutch
    Language("ëêéïôû", "die van nie vir met hierdie moet wees het om deur jou kan"),  # Afrikaans
    Language("éëäü", "dat ass net fir vun mat an op oder den de si keng"),  # Luxembourgish
)
_CENTRAL = (
    Language(  # Polish
        "łęąóżśćńź",
        "nie jest na do lub tego dla od ma jako aby przez po jak czy to za oraz tym dane",
    ),
    Language(  # Czech
        "íáéěřžčšýůúťďňó",
        "je na se pro nebo pole jako nen do tento jsou od tak byl jak za po ve to pokud zadejte",
    ),
    Language(  # Slovak
        "áíéčžšýúľťôňďäóĺŕ",
        "je na sa pre alebo pole ako do tento nie od tak bol za po vo to pri zadajte",
    ),
    Language(  # Hungarian
        "áéöőóíüúű",
        "az egy nem vagy hogy meg ez csak kell ki volt mint be el ha van lehet ezt",
    ),
    Language(  # Croatian, Serbian, Slovenian
        "čšžćđ",
        "je na se za ili ne od nije da ni ali ki ta biti mora lahko su po kako ste te iz samo",
    ),
    Language(  # Romanian
        "ăîşţâ",
        "nu este de la cu sau un pe sunt pentru din ale fie acest ca cum mai nou poate",
    ),
)
_ROMANIAN = (
    Language("ăîșțâ", "nu este de la cu sau un pe sunt pentru din ale fie acest ca cum mai nou poate"),
)
_BALTIC = (
    Language("āīēšūņļčžķģ", "ir un nav ar uz no vai par tas lai kas to pa kad ja ievadiet"),  # Latvian
    Language(  # Lithuanian
        "ėšįžųūčąę",
        "ir yra su kad arba tik kaip bus turi buvo ar nuo po jei to pagal prie",
    ),
    _ESTONIAN,
)
_TURKISH = (Language("ıüşçğöİâî", "bir ve bu ile olarak veya olan da de ne daha var en kadar mi ya her"),)
_SOUTHERN = (
    *_TURKISH,
    Language("ĉĝŝŭĥĵ", "la kaj de en ne estas por al vi uzi kun sen via nur se"),
)  # Esperanto
_VIETNAMESE = (
    Language("\u0301\u0300\u0323đươ\u0309âêôă\u0303áàéèíóúùãõêýọ", "trong cho khi trang theo hay nhau"),
)
_CYRILLIC = (
    Language("оеаинтсрвлкмдпуяыьгзбчйхжшюцщэфъё"),  # Russian
    Language("оаинітеврсклдмупязьгбйчхжцюїшщєфґ"),  # Ukrainian
    Language("аиоентрсвлдкпмзягубъчщжцшйхфюь"),  # Bulgarian
    Language("аиоенрстувјдкмлпгзбљцшчхжњћфђџ"),  # Serbian
    Language("аиоентрсвдклпмузјгбшцчжхќфњѓљѕџ"),  # Macedonian
    Language("анеіросткляўвудпмызьгцчбхэйшжюёф"),  # Belarusian
)
_GREEK = (Language("αοιετνσηυρπκμλςωάίθγδόχφέβξζήύψώϊϋΐΰ"),)
_HEBREW = (Language("יולהארתמבשנםדחפקעןטגסכזצךףץ"),)
_ARABIC = (
    Language("اليمنورتبةعدسفهكقأحجشطصىخإذزثضغئءآؤظ\u064b\u0651"),
    Language("ايرندمهوتبسشکگزخفعپقجلصحآكطچضغئژذظثءأؤ"),  # Persian
)
_THAI = (
    Language(
        "านรกอเง่มย\u0e31ลวดทตส\u0e49ะ\u0e35ปบคหแจ\u0e34พขชไใ\u0e4c\u0e47\u0e37\u0e38โซำถ\u0e39ผณธศภษฟ\u0e36ญฐฉฝฮฎฏฆฑฌๆฯ"
    ),
)

LANGUAGES = {
    "cp1252": (0, _WESTERN),
    "cp1250": (3, _CENTRAL),
    "cp1251": (8, _CYRILLIC),
    "cp1253": (13, _GREEK),
    "cp1254": (4, _TURKISH),
    "cp1255": (14, _HEBREW),
    "cp1256": (13, _ARABIC),
    "cp1257": (3, _BALTIC),
    "cp1258": (6, _VIETNAMESE),
    "cp874": (12, _THAI),
    "iso8859-2": (7, _CENTRAL),
    "iso8859-3": (12, _SOUTHERN),
    "iso8859-4": (8, _BALTIC),
    "iso8859-5": (14, _CYRILLIC),
    "iso8859-6": (15, _ARABIC),
    "iso8859-7": (16, _GREEK),
    "iso8859-10": (12, _BALTIC),
    "iso8859-13": (8, _BALTIC),
    "iso8859-15": (6, _WESTERN),
    "iso8859-16": (12, _ROMANIAN),
    "koi8-u": (11, _CYRILLIC),
    "cp737": (16, _GREEK),
    "cp775": (9, _BALTIC),
    "cp850": (11, _WESTERN),
    "cp852": (9, _CENTRAL),
    "cp857": (9, _TURKISH),
    "cp862": (16, _HEBREW),
    "cp866": (14, _CYRILLIC),
    "macintosh": (11, _WESTERN),
    "maccyrillic": (20, _CYRILLIC),
    "macgreek": (16, _GREEK),
    "maccentraleurope": (9, _CENTRAL),
    "macturkish": (9, _TURKISH),
}
"""By how many bits an encoding is less likely than the first before anything was read, and what is
written in it.
The rare ones are here because their files would otherwise be taken for those of a frequent one. All but a few
of old Macs have the names that `iconv` knows."""
_MOST_WORDS = 5


@lru_cache(16)
def missing_words(plain: frozenset[str]) -> dict[Language, int]:
    """How many fewer of a language's frequent words are among these than of the one that has the most."""
    languages = {language for _, written in LANGUAGES.values() for language in written}
    found = {it: min(len(plain.intersection(it.words.split())), _MOST_WORDS) for it in languages}
    most = max(found.values())
    return {language: most - count if language.words else 0 for language, count in found.items()}
