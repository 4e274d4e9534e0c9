"""What stands beside a number and says what it is: a phone number, a code or an amount, in many languages.

A word that ends in `*` stands for all words that hold it as a part, such as Telefonnummer for `telefon*`; other words
stand for themselves. Case and combining marks do not count.
"""
# ruff: noqa: E501, RUF001 (tables of words in many scripts)

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping

from client.curation.text import UNSPACED

PHONE: Mapping[str, str] = {
    "English": "phone* tel cell mobile call calls called calling fax ring dial whatsapp sms hotline landline",
    "German": "telefon* handy* mobil mobilnummer rufnummer* anrufen anruf ruf rufen rückruf* festnetz* durchwahl",
    "French": "téléphon* tél portable appelez appeler appelle joindre fixe",
    "Spanish": "teléfon* tfno tlf móvil celular llama llame llámame llámenos llamar llamada fijo",
    "Portuguese": "telefon* telemóvel celular ligue ligar liga chamada",
    "Italian": "telefon* cellulare cell chiama chiamate chiamare chiamami fisso",
    "Dutch": "telefoon* mobiel* bel bellen gsm",
    "Polish": "telefon* komórka komórkowy komórkę zadzwoń dzwoń dzwonić kom",
    "Czech": "telefon* mobil mobilu volejte zavolejte volat zavolej",
    "Slovak": "telefón* volajte zavolajte volať",
    "Hungarian": "telefon* mobil mobilom hívjon hívj hívható",
    "Romanian": "telefon* mobil sunați suna sunaţi",
    "Swedish, Danish, Norwegian": "telefon* mobil* tlf ring ringe ringa",
    "Finnish": "puhelin* puhelimitse puh soita soittakaa kännykkä",
    "Icelandic": "sími síma símanúmer* farsími",
    "Estonian, Latvian, Lithuanian": "telefon* tālrun* telefonas helista zvaniet skambinkite",
    "Croatian, Serbian, Slovenian": "telefon* mobitel* nazovite pozovite pokličite телефон* позовите мобилни",
    "Albanian": "telefon* celular telefononi",
    "Greek": "τηλέφων* τηλ κινητό* καλέστε σταθερό",
    "Turkish": "telefon* cep arayın arayınız ara gsm",
    "Russian, Ukrainian, Bulgarian, Kazakh": "телефон* тел моб мобильн* мобільн* мобилен* звоните позвоните дзвоніть обадете",
    "Armenian, Georgian": "հեռախոս* հեռ ტელეფონ* ტელ მობილურ*",
    "Arabic": "هاتف* تلفون* جوال* موبايل* محمول* اتصل* اتصلوا واتساب*",
    "Persian, Urdu": "تلفن* موبایل* همراه تماس فون* موبائل*",
    "Hebrew": "טלפון* נייד* טל פלאפון* התקשר* להתקשר",
    "Hindi, Marathi, Nepali": "फ़ोन* फोन* मोबाइल* मोबाईल* दूरभाष* कॉल",
    "Bengali": "ফোন* মোবাইল* টেলিফোন*",
    "Tamil, Telugu": "தொலைபேசி* கைபேசி* போன்* ఫోన్* మొబైల్*",
    "Gujarati, Punjabi, Kannada, Malayalam": "ફોન* મોબાઇલ* ਫ਼ੋਨ* ਫੋਨ* ਮੋਬਾਈਲ* ಫೋನ್* ಮೊಬೈಲ್* ഫോൺ* മൊബൈൽ*",
    "Sinhala": "දුරකථන* ජංගම",
    "Chinese": "电话* 電話* 手机* 手機* 致电* 致電* 座机* 联系方式*",
    "Japanese": "電話* 携帯* 携帯番号* ケータイ* でんわ*",
    "Korean": "전화* 휴대폰* 핸드폰* 연락처* 휴대전화*",
    "Thai, Lao": "โทร* มือถือ* เบอร์* ໂທ*",
    "Khmer, Burmese": "ទូរស័ព្ទ* ဖုန်း*",
    "Vietnamese": "thoại đt sđt gọi hotline",
    "Indonesian, Malay": "telepon* telefon* hp hubungi ponsel wa",
    "Filipino": "telepono* tawag tawagan selpon",
    "Swahili, Amharic": "simu piga ስልክ*",
    "Mongolian": "утас* дугаар*",
}

CODE: Mapping[str, str] = {
    "English": "order orders invoice ref reference ticket case code id serial tracking account parcel sku ean gtin imei "
    "isbn issn doi rfc pin otp ssn vat tax iban item part lot batch build revision commit article model receipt zip",
    "German": "bestell* bestellung rechnung* kundennummer* kundennr auftrag* vorgang* aktenzeichen sendung* konto* "
    "artikel* plz postleitzahl* seriennummer* steuernummer*",
    "French": "commande* facture* référence* réf dossier colis compte siret siren article",
    "Spanish": "pedido* factura* referencia* expediente cuenta código* envío dni nif artículo",
    "Portuguese": "encomenda* fatura* referência* conta processo cpf nif",
    "Italian": "ordine* fattura* riferimento rif codice conto pratica",
    "Dutch": "bestelling* bestelnummer* ordernummer* factuur* rekening* klantnummer*",
    "Polish": "zamówieni* faktur* przesyłk* konto kod nip regon pesel",
    "Czech, Slovak": "objednávk* faktúr* zásilk* zásielk* účet kód ičo ič dič",
    "Hungarian": "rendelés* számla* azonosító* cikkszám*",
    "Romanian": "comand* factur* cod cont",
    "Swedish, Danish, Norwegian": "beställning* bestilling* ordre* ordernummer* ärende* kundnummer* saksnummer*",
    "Finnish": "tilaus* lasku* viite* asiakasnumero*",
    "Greek": "παραγγελί* τιμολόγι* κωδικ* αφμ",
    "Turkish": "sipariş* fatura* kod takip",
    "Russian, Ukrainian, Bulgarian": "заказ* счет счёт артикул код инн договор* замовлен* рахун* поръчк* трек",
    "Arabic, Persian": "طلب الطلب فاتورة* مرجع رمز حساب سفارش* فاکتور* کد",
    "Hebrew": "הזמנה* חשבונית* קוד",
    "Hindi": "ऑर्डर* आदेश* बिल खाता कोड",
    "Chinese": "订单* 訂單* 单号* 單號* 编号* 編號* 账号* 帳號* 发票* 發票* 验证码* 代码* 快递*",
    "Japanese": "注文* 伝票* 口座* 会員* 請求書* コード* 追跡*",
    "Korean": "주문* 송장* 계좌* 코드* 인증번호*",
    "Thai": "คำสั่งซื้อ* ใบแจ้งหนี้* รหัส* บัญชี*",
    "Vietnamese": "đơn mã hóa",
    "Indonesian, Malay": "pesanan* faktur* kode resi rekening",
}

UNITS = (
    "million* millones milione* milhões mio mrd mld mln тыс млн млрд tys tis thousand billion* lakh crore "
    "people persons inhabitants habitants habitantes personas einwohner* abitanti inwoners mieszkańc* osób obyvatel* lidí "
    "жител* человек invånare innbyggere asukasta lakos* locuitor* km m kg g t ha l ml cm mm km² m² kwh mw gw gb mb kb tb "
    "bytes rows lines tokens words pieces units stück sztuk ks шт votes votos voix stimmen copies steps views users "
    "years days hours miles feet acres pts points puntos punkte"
)
UNITS_UNSPACED = "万 億 亿 萬 만 ล้าน 人 名 명 个 個 件 개 円 元 원 圓 บาท"

MONEY = (
    "usd eur gbp chf kč zł złot* forint* leva лв руб* грн lira* dinar* dirham* riyal* rupee* rupiah* shilling* peso* soles "
    "reais euro* dollar* pound* franc* franken* koron* krone* kronor* yuan* baht đồng ريال درهم جنيه دينار रुपये টাকা"
)
# In capitals alone, for some are words.
MONEY_CODES = (
    "JPY CAD AUD NZD INR CNY RMB SEK NOK DKK ISK PLN CZK HUF RON BGN RSD TRY UAH RUB KZT ILS AED SAR EGP MAD ZAR NGN KES "
    "GHS BRL MXN ARS CLP COP PEN UYU KRW TWD HKD SGD THB VND IDR MYR PHP PKR BDT LKR Rs Rp RM Kr kr Ft TL"
)


def folded(text: str) -> str:
    """The text without case and combining marks, as words of this page are compared."""
    plain = unicodedata.normalize("NFKD", text.casefold())
    return "".join(letter for letter in plain if unicodedata.category(letter) != "Mn")


def pattern(words: Iterable[str], form: Callable[[str], str] = folded) -> str:
    """A regular expression for words as this page writes them, in text of that form."""
    whole: list[str] = []
    parts: list[str] = []
    unspaced: list[str] = []
    for word in sorted(set(" ".join(words).split()), key=lambda word: (-len(word), word)):
        stem = re.escape(form(word.rstrip("*")))
        kind = unspaced if re.match(rf"[{UNSPACED}\u1100-\u11ff\uac00-\ud7af]", folded(word)) else whole
        (parts if word.endswith("*") and kind is whole else kind).append(stem)
    spaced = rf"(?<!\w)(?:{'|'.join(whole) or '(?!)'})(?!\w)|(?<!\w)\w*(?:{'|'.join(parts) or '(?!)'})\w*"
    return f"{spaced}|{'|'.join(unspaced)}" if unspaced else spaced
