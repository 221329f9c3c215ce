"""Which encoding a file is in is told by what it then says; where that is not clear, the file is refused."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sage.tools.finetune.data import load_conversations, validate_file
from sage.tools.finetune.data.encodings import detect_encoding, possible_encodings
from sage_contracts.errors import InvalidDataError

FEW = {
    "cp1252": [
        "150°C", "150° north", "5±2", "3µm", "© 2020", "wait…", "£5", "10 €", "café", "crème brûlée", "naïve",
        "“Hello”", "it’s", "a—b", "a – b", "à la carte", "München", "Größe", "ça va", "El Niño", "São Paulo",
        "½ cup", "«Oui»", "« Où ? »", "¿Qué?", "· item", "Übung", "§ 5", "1º", "x²", "2 × 3", "résumé", "Åse",
    ],
    "gb18030": ["你好", "元", "5元", "北京", "人民币", "国家", "文件名", "中国", "中"],
    "big5": ["你好", "北京", "國家"],
    "cp932": ["こんにちは", "日本", "の", "東京", "テスト"],
    "cp949": ["한국어", "안녕하세요"],
    "cp1251": ["Привет", "мир"],
    "utf-8": [
        "é", "Привет", "Σ", "µ", "÷", "°", "café", "—", "ə", "Ł", "ł", "元", "北京", "Հայաստան",
        "שלום", "مرحبا", "\ufffd", "Қазақстан", "Ελλάδα", "češka", "Źródło", "€", "😀",
    ],
}  # fmt: skip
SENTENCES = {
    "cp1252": [
        "Où est le café ? Près de l’église, à côté du théâtre.",
        "C’est l’été : il fait très chaud à Besançon.",
        "Die Größe der Tür beträgt 2 Meter – ungefähr.", "Übermäßig schöne Häuser stehen überall in München.",
        "¿Dónde está el niño pequeño? Mañana volverá.", "Não há opções de configuração disponíveis.",
        "Smörgåsbord är på svenska, blåbærsyltetøj på norsk.", "Perché la città è così bella? È già tardi.",
        "Bake it at 150 °C for 10 minutes – it’s “done” then.",
    ],
    "gb18030": [
        "什么是网关？网关是所有请求的入口。", "请把文件复制到新的文件夹里。", "北京是中华人民共和国的首都。",
        "今天天气很好，我们去公园散步吧。", "這個檔案無法開啟，請檢查權限。", "模型的训练需要大量数据。",
    ],
    "big5": [
        "什麼是閘道？閘道是所有請求的入口。", "請把檔案複製到新的資料夾裡。", "台北是一個很大的城市。",
        "今天天氣很好，我們去公園散步吧。", "這個檔案無法開啟，請檢查權限。",
    ],
    "cp932": [
        "ゲートウェイとは何ですか。", "すべてのリクエストの入口です。", "ファイルを開くことができません。",
        "今日は天気がいいので、公園を散歩しましょう。", "東京は日本の首都です。",
    ],
    "euc_jp": [
        "ゲートウェイとは何ですか。", "すべてのリクエストの入口です。", "ファイルを開くことができません。",
        "今日は天気がいいので、公園を散歩しましょう。",
    ],
    "cp949": [
        "게이트웨이가 무엇입니까?", "모든 요청의 입구입니다.", "파일을 열 수 없습니다.",
        "오늘은 날씨가 좋아서 공원에 산책하러 갑시다.", "서울은 대한민국의 수도입니다.",
    ],
    "cp1251": [
        "Что такое шлюз? Это вход для всех запросов.", "Файл не удалось открыть.", "Сегодня хорошая погода.",
        "Москва — столица России.",
    ],
    "utf-8": [
        "Où est le café ?", "Что такое шлюз?", "什么是网关？", "Πού είναι το αρχείο;", "Zażółć gęślą jaźń.",
        "Příliš žluťoučký kůň.", "今日は天気がいい。", "모든 요청의 입구입니다.", "איפה הקובץ?",
    ],
}  # fmt: skip
WORLD = {
    "cp1250": [
        "Jak zmienić hasło? Wejdź w ustawienia i kliknij „Zmień hasło”.",
        "Ile trwa zwrot? Zażółć gęślą jaźń.",
        "Jak změním heslo? Otevřete nastavení a klikněte na tlačítko.",
        "Příliš žluťoučký kůň úpěl ďábelské ódy.",
        "Hogyan változtatom meg a jelszót? Nyissa meg a beállításokat, erősítse meg. Őrült tűzoltó űr.",
        "Cum schimb parola? Deschideţi setările şi apăsaţi pe buton, această acţiune este definitivă.",
        "Kako promijeniti lozinku? Otvorite postavke i kliknite na dugme: češće žurne račune.",
    ],
    "cp1253": ["Πώς αλλάζω τον κωδικό; Ανοίξτε τις ρυθμίσεις και πατήστε το κουμπί."],
    "cp1254": ["Şifremi nasıl değiştiririm? Ayarları açın ve değiştir düğmesine tıklayın. İşlem bitti."],
    "cp1255": ["איך משנים סיסמה? פתחו את ההגדרות ולחצו על הכפתור."],
    "cp1256": [
        "كيف أغير كلمة المرور؟ افتح الإعدادات ثم اضغط على الزر.",
        "تنظيمات را باز کنيد و روي دکمه بزنيد.",
    ],
    "cp1257": [
        "Kā nomainīt paroli? Atveriet iestatījumus un noklikšķiniet uz pogas. Šī darbība ir galīga.",
        "Kaip pakeisti slaptažodį? Atidarykite nustatymus ir spustelėkite mygtuką. Žinutė išsiųsta.",
    ],
    "cp874": ["เปลี่ยนรหัสผ่านอย่างไร เปิดการตั้งค่าแล้วกดปุ่ม"],
    "koi8_r": ["Как сменить пароль? Откройте настройки и нажмите на кнопку.", "Файл не удалось открыть."],
    "mac_roman": [
        "Comment changer mon mot de passe ? C’est terminé, félicitations à l’équipe, voilà la clé.",
        "Wie ändere ich das Passwort? Öffnen Sie die Einstellungen. Schöne Grüße aus München.",
    ],
    "cp850": [
        "Comment changer mon mot de passe ? Félicitations à toute cette équipe, voilà la clé privée.",
        "Wie ändere ich das Passwort? Öffnen Sie die Einstellungen. Schöne Grüße aus München.",
    ],
    "cp852": ["Jak zmienić hasło? Wejdź w ustawienia i kliknij, następnie wpisz żądane słowo."],
    "cp866": ["Как сменить пароль? Откройте настройки и нажмите на кнопку."],
    "iso8859_2": ["Jak zmienić hasło? Wejdź w ustawienia i kliknij, następnie wpisz żądane słowo."],
    "iso8859_7": ["Πώς αλλάζω τον κωδικό; Ανοίξτε τις ρυθμίσεις και πατήστε το κουμπί."],
}  # fmt: skip
"""What spreadsheets outside of Western Europe save, and those of old Macs and DOS."""
ENGLISH = ["How long does it take?", "Ten minutes at most.", "Copy the file, then restart.", "See [1]; {x}"]


@pytest.mark.parametrize(("encoding", "word"), [(e, word) for e, words in FEW.items() for word in words])
@pytest.mark.parametrize("count", [1, 60])
def test_a_word_in_an_english_file_tells_its_encoding(encoding: str, word: str, count: int) -> None:
    rows = "".join(f"How hot is it {n}?,Set it to {word} for {n} minutes\n" for n in range(count))
    head = f"question,answer\n{rows}".encode(encoding)
    found = detect_encoding(head, is_whole=True)
    assert found is not None, possible_encodings(head, is_whole=True)
    assert head.decode(found) == head.decode(encoding)


@given(
    st.sampled_from(sorted(SENTENCES)).flatmap(
        lambda encoding: st.tuples(
            st.just(encoding), st.lists(st.sampled_from(SENTENCES[encoding]), min_size=1, max_size=8)
        )
    ),
    st.lists(st.sampled_from(ENGLISH), max_size=20),
    st.integers(),
    st.sampled_from([lambda row: f"q?,{row}\n", lambda row: f'{{"text": "{row}"}}\n', lambda row: f"{row}"]),
)
def test_sentences_are_read_as_they_were_written(
    written: tuple[str, list[str]], english: list[str], seed: int, line: object
) -> None:
    encoding, sentences = written
    rows = [*sentences, *english]
    random.Random(seed).shuffle(rows)
    head = "".join(map(line, rows)).encode(encoding)  # type: ignore[arg-type]
    found = detect_encoding(head, is_whole=True)
    assert found is not None, possible_encodings(head, is_whole=True)
    assert head.decode(found) == head.decode(encoding)


@pytest.mark.parametrize(
    ("encoding", "sentence"), [(e, one) for e, several in WORLD.items() for one in several]
)
@pytest.mark.parametrize("english", [[], ENGLISH])
def test_a_table_in_the_encoding_of_another_language_is_read(
    tmp_path: Path, encoding: str, sentence: str, english: list[str]
) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes("\n".join(["text", *(f'"{row}"' for row in [sentence, *english])]).encode(encoding))
    assert load_conversations(path)[0].messages[1]["content"] == sentence
    assert validate_file(path).notes


@given(
    st.sampled_from([(encoding, one) for encoding, several in WORLD.items() for one in several]),
    st.lists(st.sampled_from(ENGLISH), max_size=20),
)
def test_a_sentence_of_another_language_is_read_as_written_or_refused(
    written: tuple[str, str], english: list[str]
) -> None:
    encoding, sentence = written
    head = "\n".join(["text", *english, sentence]).encode(encoding)
    found = detect_encoding(head, is_whole=True)
    assert found is None or head.decode(found) == head.decode(encoding)


@pytest.mark.parametrize(
    ("encoding", "language"), [("cp855", "cp1251"), ("johab", "cp949"), ("cp869", "cp1253")]
)
def test_text_in_an_encoding_that_is_not_known_is_no_text_of_another(encoding: str, language: str) -> None:
    rows = (SENTENCES | WORLD)[language]
    head = "\n".join(["text", *rows, *ENGLISH]).replace("—", "-").encode(encoding)
    assert possible_encodings(head, is_whole=True) == {}


@given(st.binary(max_size=200), st.booleans())
def test_any_bytes_have_an_answer(content: bytes, is_whole: bool) -> None:
    for encoding in possible_encodings(b"text\n" + content, is_whole=is_whole):
        content.decode(encoding, "replace")


@given(st.text(st.characters(codec="cp1252", min_codepoint=32), max_size=20), st.integers(1, 40))
def test_no_control_character_is_read_into_text(text: str, count: int) -> None:
    head = f"text\n{f'say {text} now'.join([chr(10)] * (count + 1))}".encode("cp1252")
    encoding = detect_encoding(head, is_whole=True)
    if encoding is not None and not encoding.startswith("utf"):
        assert not {*map(chr, range(0x80, 0xA0))} & {*head.decode(encoding, "replace")}


def test_the_rest_of_a_file_is_read_like_its_beginning(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    rows = [f"How hot {n}?,Bake it at 150°C for {n} minutes" for n in range(60)]
    path.write_bytes("\r\n".join(["question,answer", *rows]).encode("cp1252"))
    assert load_conversations(path)[59].messages[1]["content"] == "Bake it at 150°C for 59 minutes"
    assert validate_file(path).notes == ["rows.csv is read as CP1252"]


def test_a_file_that_may_be_in_several_encodings_is_refused_with_their_names(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes("question,answer\nWhat?,Say 一 please\n".encode("big5"))
    with pytest.raises(InvalidDataError) as refused:
        load_conversations(path)
    message = str(refused.value)
    assert all(f"{name} (where it says " in message for name in ("big5", "cp1252")), message
    assert "iconv -f big5 -t utf-8 rows.csv" in message, message


@pytest.mark.parametrize("slip", ["С", "С and Р", "Сollaborate оf", "ə", "е\u0301", "ʼ", "Ʌ"])
def test_a_few_odd_letters_leave_utf_8_what_it_is(tmp_path: Path, slip: str) -> None:
    """Letters that look like Latin ones get into English by keyboards of two languages."""
    path = tmp_path / "rows.csv"
    path.write_text(f"question,answer\nWhat?,Say {slip} please\n", encoding="utf-8")
    assert load_conversations(path)[0].messages[1]["content"] == f"Say {slip} please"


@pytest.mark.parametrize("word", ["café", "wait…"])
def test_a_word_of_an_old_mac_is_not_taken_for_one_of_windows(tmp_path: Path, word: str) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(f"question,answer\nWhat?,Say {word} now\n".encode("mac_roman"))
    with pytest.raises(InvalidDataError, match=r"may be text in .*macintosh \(where it says "):
        load_conversations(path)


def test_a_wrong_byte_is_a_fault_of_its_row_in_any_encoding(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    rows = [f"什么是网关{n}？,网关是所有请求的入口。\n".encode("gb18030") for n in range(40)]
    rows[3] = rows[3].replace("入".encode("gb18030"), b"\xff", 1)
    path.write_bytes(b"question,answer\n" + b"".join(rows))
    assert [(bad.row, bad.field) for bad in validate_file(path).bad] == [(4, "answer")]
