"""Details are masked whatever script stands beside them, phone numbers as each region writes them, and little else."""
# ruff: noqa: RUF001 (sentences in many scripts)

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import phonenumbers
import pytest
from phonenumbers import PhoneNumberFormat, PhoneNumberType

from apiary.config.schema import Method
from apiary.data.examples import Example
from apiary.data.turns import Turn
from benchmarks.masking import SENTENCES, other
from client.curation import curate

RESULTS = Path(__file__).resolve().parents[3] / "benchmarks" / "results" / "masking.json"


def masked(text: str, **options: Any) -> str:
    steps = [Method.model_validate({"name": "mask", **options})]
    (made,) = curate([Example((Turn("user", text), Turn("assistant", "ok")), {})], steps).examples
    return made.turns[0].text


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("请把订单号发到refund.desk@invented.example我们会办理", "请把订单号发到<EMAIL_1>我们会办理"),
        ("已发到li.mei@invented.example2024年再查。", "已发到<EMAIL_1>2024年再查。"),
        ("tanaka.k@invented.exampleまで。tanaka.k@invented.exampleは平日。", "<EMAIL_1>まで。<EMAIL_1>は平日。"),
        ("minji@invented.example으로, minji@invented.example은", "<EMAIL_1>으로, <EMAIL_1>은"),
        ("ส่งอีเมลไปที่somchai@invented.exampleและเรา", "ส่งอีเมลไปที่<EMAIL_1>และเรา"),
        (
            "連絡先：ｔａｎａｋａ＠ｉｎｖｅｎｔｅｄ．ｅｘａｍｐｌｅ まで tanaka@invented.example",
            "連絡先：<EMAIL_1> まで <EMAIL_1>",
        ),
        ("我的邮箱是12345678@invented.example。", "我的邮箱是<EMAIL_1>。"),
        ("пишите наanna@x.example или иван1@пример.рф.", "пишите на<EMAIL_1> или <EMAIL_2>."),
        ("راسلنا علىanna@x.exampleاليوم", "راسلنا على<EMAIL_1>اليوم"),
        ("राम@उदाहरण.भारत को, uni@ko\u0308ln.example", "<EMAIL_1> को, <EMAIL_2>"),
        ("用户@例え.テスト 사용자@예시.한국으로", "<EMAIL_1> <EMAIL_2>으로"),
        ("a@b.example_ x@y.example-Kontakt (q@z.example)", "<EMAIL_1>_ <EMAIL_2>-Kontakt (<EMAIL_3>)"),
        ("カード４１１１　１１１１　１１１１　１１１１です", "カード<CARD_1>です"),
        ("карта4111 1111 1111 1111и счёт GB82WEST12345698765432и", "карта<CARD_1>и счёт <IBAN_1>и"),
        ("发到a@b.com网站x.com", "发到<EMAIL_1>网站x.com"),
    ],
)
def test_a_detail_alone_is_masked_whatever_stands_beside_it(text: str, right: str) -> None:
    assert masked(text) == right


@pytest.mark.parametrize(
    ("region", "text", "right"),
    [
        ("ES", "Mi teléfono: 612 345 678", "Mi teléfono: <PHONE_1>"),
        ("ES", "612 345 678", "<PHONE_1>"),
        ("PL", "zadzwoń 512 345 678 lub 513 345 678", "zadzwoń <PHONE_1> lub <PHONE_2>"),
        ("CZ", "Volejte 601 123 456.", "Volejte <PHONE_1>."),
        ("PT", "telemóvel 912 345 678", "telemóvel <PHONE_1>"),
        ("PE", "celular 912 345 678", "celular <PHONE_1>"),
        ("ES", "tel. 612.345.678", "tel. <PHONE_1>"),
        ("CN", "电话13812345678转8", "电话<PHONE_1>转8"),
        ("JP", "０３ー１２３４ー５６７８まで", "<PHONE_1>まで"),
        ("VN", "SĐT0912345678", "SĐT<PHONE_1>"),
        ("SA", "هاتف ٠٥٠١٢٣٤٥٦٧", "هاتف <PHONE_1>"),
        ("ES", "pedido 612345678, móvil 612345678", "pedido 612345678, móvil <PHONE_1>"),
        ("NC", "Tel. 20.11.85, né le 20.11.85", "Tel. <PHONE_1>, né le 20.11.85"),
    ],
)
def test_phone_numbers_as_people_write_them(region: str, text: str, right: str) -> None:
    assert masked(text, regions=[region]) == right


@pytest.mark.parametrize(
    ("region", "text"),
    [
        ("ES", "una población de 612 345 678 habitantes"),
        ("PL", "kosztuje 512 345 678 zł"),
        ("ES", "612.345.678 euros, o 612.345.678"),
        ("PL", "zamówienie 512 345 678"),
        ("ES", "My phone is broken. It was order 612 345 678"),
        ("CN", "订单13812345678"),
        ("US", "phone call on 12/05/2023 about v2.10.11"),
    ],
)
def test_amounts_and_codes_stay(region: str, text: str) -> None:
    assert masked(text, regions=[region]) == text


def test_the_word_for_phone_is_known_in_many_languages() -> None:
    """Bare digits are no phone number by themselves, so each sentence is masked for its word alone."""
    assert len(SENTENCES) >= 15
    assert [s for s in SENTENCES if masked(s.format("612345678"), regions=["ES"]) != s.format("<PHONE_1>")] == []
    assert masked("612345678", regions=["ES"]) == "612345678"


def test_home_numbers_of_every_fourth_region_are_masked_after_the_word() -> None:
    """The benchmark does all of them, four times each."""
    missed, regions = [], sorted(phonenumbers.SUPPORTED_REGIONS)[::4]
    for region in regions:
        number = phonenumbers.example_number_for_type(region, PhoneNumberType.MOBILE)
        number = number or phonenumbers.example_number(region)
        text = phonenumbers.format_number(number, PhoneNumberFormat.NATIONAL)
        if masked(f"Phone: {text}, thanks", regions=[region]) != "Phone: <PHONE_1>, thanks":
            missed.append((region, text))
    assert len(regions) > 55 and missed == []


def test_other_figures_of_many_kinds_stay() -> None:
    rng = random.Random(1)
    regions = sorted(phonenumbers.SUPPORTED_REGIONS)
    texts = [(kind, text) for _ in range(60) for kind, text in other(rng).items() if "without" not in kind]
    assert [
        t for _, t in texts if masked(f"Mine: {t}, thanks", regions=[rng.choice(regions)]) != f"Mine: {t}, thanks"
    ] == []


def test_the_committed_measurement_keeps_the_promise_of_the_page() -> None:
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert all(way["share"] > 0.99 and way["n"] >= 800 for way in results["found"].values())
    assert results["regions_below_99"] == {}
    assert all(k["share"] < 0.001 for name, k in results["taken_wrongly"].items() if "without" not in name)
