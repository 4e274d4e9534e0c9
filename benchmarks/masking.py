"""How many personal details the curation step `mask` finds, and how much else it takes for one.

Valid phone numbers of every region that phonenumbers knows, in its own formats, alone and after a word for phone in
many languages; mail addresses beside letters of many scripts; and amounts, dates, versions, ISBNs and codes, with a
region named. A detail counts as found where all of it is masked and nothing else is.

python benchmarks/masking.py [--each 4] [--out FILE]
"""
# ruff: noqa: RUF001 (sentences in many scripts)

from __future__ import annotations

import argparse
import json
import random
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import phonenumbers
from phonenumbers import PhoneNumber, PhoneNumberFormat, PhoneNumberType

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from apiary.config.schema import Method  # noqa: E402
from apiary.data.examples import Example  # noqa: E402
from apiary.data.turns import Turn  # noqa: E402
from apiary.tracking import environment  # noqa: E402
from client.curation import build_steps  # noqa: E402
from client.curation.pipeline import Context  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "masking.json"
_TYPES = (PhoneNumberType.MOBILE, PhoneNumberType.FIXED_LINE)

SENTENCES = (  # a language each, with its word for phone
    "My phone number is {}.",
    "Meine Telefonnummer ist {}.",
    "Mon numéro de téléphone : {}",
    "Mi teléfono es {}.",
    "O meu telemóvel é {}.",
    "Il mio cellulare è {}",
    "Mijn telefoonnummer is {}.",
    "Proszę dzwonić: {}",
    "Volejte prosím {}",
    "Telefonszám: {}",
    "Telefon: {}, mulțumesc",
    "Ring mig på {}",
    "Puhelin {}",
    "Τηλέφωνο: {}",
    "Cep telefonum {}",
    "Телефон: {}",
    "رقم الهاتف: {}",
    "تلفن من {}",
    "הטלפון שלי {}",
    "मेरा फ़ोन नंबर {} है",
    "আমার ফোন {}",
    "தொலைபேசி: {}",
    "我的电话是{}，谢谢",
    "電話番号は{}です",
    "전화번호는 {}입니다",
    "เบอร์โทร {} ครับ",
    "Điện thoại: {}",
    "Nomor telepon saya {}",
    "Simu yangu ni {}",
)
BESIDE = (  # an address beside letters, digits and full-width forms
    "请写信到{}我们会回复",
    "已发到{}2024年再查",
    "連絡先は{}までご連絡ください",
    "{}으로 보내세요",
    "ส่งไปที่{}และรอ",
    "пишите на{}или звоните",
    "راسلنا على{}اليوم",
    "को {} पर लिखें",
    "Write to {}, please.",
    "({})",
)


class Detail(NamedTuple):
    """A text with one detail in it, and the kind that its placeholder names."""

    kind: str
    frame: str
    written: str
    regions: tuple[str, ...] = ()


def masked(text: str, regions: Sequence[str] = ()) -> str:
    """The text after the step `mask`."""
    ((_, step),) = build_steps([Method.model_validate({"name": "mask", "regions": list(regions)})])
    row = Example((Turn("user", text), Turn("assistant", "ok")), {})
    return step.apply([(0, row)], Context()).rows[0][1].turns[0].text


def found(detail: Detail) -> bool:
    """Whether all of the detail is masked, and nothing else."""
    return masked(detail.frame.format(detail.written), detail.regions) == detail.frame.format(f"<{detail.kind}_1>")


def numbers(region: str, each: int, rng: random.Random) -> Iterator[PhoneNumber]:
    """Up to `each` valid mobile and fixed-line numbers of a region: its examples with other last digits."""
    for kind in _TYPES:
        example = phonenumbers.example_number_for_type(region, kind)
        for _ in range(each if example else 0):
            for size in (3, 2, 1, 0):
                national = str(example.national_number)
                tail = "".join(rng.choices("0123456789", k=size))
                number = PhoneNumber(
                    example.country_code,
                    int(national[: len(national) - size] + tail),
                    italian_leading_zero=example.italian_leading_zero,
                    number_of_leading_zeros=example.number_of_leading_zeros,
                )
                if phonenumbers.is_valid_number_for_region(number, region):
                    yield number
                    break


def phone_details(each: int, rng: random.Random) -> Iterator[tuple[str, str, Detail]]:
    """(how it is written, region, detail) for numbers of all regions."""
    for region in sorted(phonenumbers.SUPPORTED_REGIONS):
        for number in numbers(region, each, rng):
            national = phonenumbers.format_number(number, PhoneNumberFormat.NATIONAL)
            abroad = rng.choice((PhoneNumberFormat.INTERNATIONAL, PhoneNumberFormat.E164))
            written = phonenumbers.format_number(number, abroad)
            yield "with the country code", region, Detail("PHONE", rng.choice(("Mine: {}.", "{}", "({})")), written)
            sentence = rng.choice(SENTENCES)
            yield "at home, after a word for phone", region, Detail("PHONE", sentence, national, (region,))
            dotted = national.replace(" ", rng.choice((".", "-"))) if "(" not in national else national
            yield "the same, with dots or hyphens", region, Detail("PHONE", sentence, dotted, (region,))
            if not national.isdigit():
                yield "at home, without a word", region, Detail("PHONE", "Mine: {}, thanks", national, (region,))


def mail_details(each: int, rng: random.Random) -> Iterator[tuple[str, str, Detail]]:
    """Addresses beside letters of many scripts, in ASCII and in full width."""
    for frame in BESIDE:
        for _ in range(20 * each):
            name = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9)))
            address = f"{name}{rng.choice(('', '.x', '_9', '7'))}@{rng.choice(('invented.example', 'a.b.example'))}"
            wide = "".join(chr(ord(c) + 0xFEE0) for c in address)
            yield "mail address", frame, Detail("EMAIL", frame, address)
            yield "mail address in full width", frame, Detail("EMAIL", frame, wide)


def other(rng: random.Random) -> dict[str, str]:
    """One of each kind of text with figures that are no personal detail."""
    from stdnum import ean

    amount = rng.randint(1_000, 999_999_999)
    sep = rng.choice((" ", ",", ".", "\u00a0"))
    money = rng.choice(("{} EUR", "{} €", "USD {}", "${}", "{} zł", "{} Kč", "{} 円", "{} руб.", "{} people", "{} km"))
    year, month, day = rng.randint(1900, 2099), rng.randint(1, 12), rng.randint(1, 28)
    shape = rng.choice(
        ("{0}-{1:02}-{2:02}", "{2:02}.{1:02}.{0}", "{1}/{2}/{0}", "{2:02}-{1:02}-{0}", "{0}/{1:02}/{2:02}")
    )
    body = f"978{rng.randint(0, 9)}{rng.randint(10**7, 10**8 - 1)}"
    isbn = body + str(ean.calc_check_digit(body))
    word = rng.choice(
        ("order", "Bestellnummer", "pedido", "заказ", "invoice", "订单", "commande", "ref.", "zamówienie")
    )
    code = rng.choice(("{}", "{}-{}", "{} {}")).format(rng.randint(10_000, 99_999_999), rng.randint(100, 9_999))
    return {
        "amounts": money.format(f"{amount:,}".replace(",", sep)),
        "dates": shape.format(year, month, day),
        "versions": f"{rng.choice(('v', 'version '))}{rng.randint(0, 30)}.{rng.randint(0, 99)}.{rng.randint(0, 9999)}",
        "ISBNs": rng.choice((isbn, f"{isbn[:3]}-{isbn[3]}-{isbn[4:8]}-{isbn[8:12]}-{isbn[12]}", f"ISBN {isbn}")),
        "codes": f"{word} {code}",
        "amounts without a unit": f"{amount:,}".replace(",", " "),
        "codes without a word": code,
    }


def measure(each: int, seed: int = 0) -> dict[str, Any]:
    """Shares found by way of writing, the regions below 99%, and the share of other texts that are changed."""
    rng = random.Random(seed)
    hits: dict[str, Counter[bool]] = defaultdict(Counter)
    by_region: dict[str, Counter[bool]] = defaultdict(Counter)
    for way, where, detail in (*phone_details(each, rng), *mail_details(each, rng)):
        hit = found(detail)
        hits[way][hit] += 1
        if detail.kind == "PHONE" and way != "at home, without a word":
            by_region[where][hit] += 1
    wrong: dict[str, Counter[bool]] = defaultdict(Counter)
    regions = sorted(phonenumbers.SUPPORTED_REGIONS)
    for number in range(10 * each * len(regions)):
        for kind, text in other(rng).items():
            wrong[kind][
                masked(f"Mine: {text}, thanks", (regions[number % len(regions)],)) != f"Mine: {text}, thanks"
            ] += 1
    return {
        "found": {way: _share(counts) for way, counts in hits.items()},
        "regions_below_99": {r: _share(c)["share"] for r, c in by_region.items() if c[True] < 0.99 * c.total()},
        "taken_wrongly": {kind: _share(counts) for kind, counts in wrong.items()},
    }


def _share(counts: Counter[bool]) -> dict[str, Any]:
    return {"share": round(counts[True] / counts.total(), 5), "n": counts.total()}


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--each", type=int, default=4, help="numbers of each type and region")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    machine = environment.machine(gpu=False)
    results = {"machine": machine, "phonenumbers": phonenumbers.__version__, **measure(args.each)}
    args.out.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(args.out.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
