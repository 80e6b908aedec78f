"""Protobuf's own implementation beside ours, over the same descriptors.

  protojson.py DESCRIPTORS generate COUNT   random messages as lines {"type", "json", "hex"}
  protojson.py DESCRIPTORS check            reads lines {"type", "json", "hex", "original"} and compares all three

The messages are the same in every run.
"""

import json
import random
import sys

from google.protobuf import descriptor_pb2, descriptor_pool, json_format, message_factory
from google.protobuf.descriptor import FieldDescriptor as Field

PACKAGES = ("process", "filesystem")
# The bounds of google.protobuf.Timestamp that both sides can print: the years 1 to 9999.
TIMESTAMP = (-62135596800, 253402300799)
STRINGS = ["", "a", "/home/user", "ü€😀", 'quote" back\\slash', "line\nfeed\ttab", "\x00\x1f\x7f", "\u2028<&>"]


def load(path):
    with open(path, "rb") as file:
        files = descriptor_pb2.FileDescriptorSet.FromString(file.read())
    pool = descriptor_pool.DescriptorPool()
    for file in files.file:
        pool.Add(file)
    names = []

    def collect(prefix, message):
        if message.options.map_entry:
            return
        name = f"{prefix}.{message.name}"
        names.append(name)
        for nested in message.nested_type:
            collect(name, nested)

    for file in files.file:
        if file.package in PACKAGES:
            for message in file.message_type:
                collect(file.package, message)
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(name)) for name in names}


def integer(rng, low, high):
    return rng.choice([0, 1, low, high, rng.randint(low, high)])


def scalar(rng, field):
    kind = field.type
    if kind in (Field.TYPE_INT32, Field.TYPE_SINT32):
        return integer(rng, -(2**31), 2**31 - 1)
    if kind == Field.TYPE_INT64:
        return integer(rng, -(2**63), 2**63 - 1)
    if kind == Field.TYPE_UINT32:
        return integer(rng, 0, 2**32 - 1)
    if kind == Field.TYPE_UINT64:
        return integer(rng, 0, 2**64 - 1)
    if kind == Field.TYPE_BOOL:
        return rng.random() < 0.5
    if kind == Field.TYPE_STRING:
        return rng.choice(STRINGS)
    if kind == Field.TYPE_BYTES:
        return rng.randbytes(rng.choice([0, 1, 2, 3, 40]))
    if kind == Field.TYPE_ENUM:
        return rng.choice(field.enum_type.values).number
    raise SystemExit(f"{field.full_name}: a field of a type that this generator does not know")


def fill(rng, message, depth=0):
    if message.DESCRIPTOR.full_name == "google.protobuf.Timestamp":
        message.seconds = rng.choice([0, rng.randint(*TIMESTAMP)])
        message.nanos = rng.choice([0, 5_000_000, 999_999_999, rng.randrange(10**9)])
        return
    chosen = {oneof: rng.choice(oneof.fields) for oneof in message.DESCRIPTOR.oneofs}
    for field in message.DESCRIPTOR.fields:
        one = field.containing_oneof
        if rng.random() < 0.25 or (one is not None and chosen[one] is not field):
            continue
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            for _ in range(rng.randrange(3)):
                getattr(message, field.name)[rng.choice(STRINGS)] = rng.choice(STRINGS)
        elif field.is_repeated:
            values = getattr(message, field.name)
            for _ in range(rng.randrange(3)):
                if field.message_type is None:
                    values.append(scalar(rng, field))
                else:
                    fill(rng, values.add(), depth + 1)
        elif field.message_type is not None:
            part = getattr(message, field.name)
            part.SetInParent()
            if depth < 6:
                fill(rng, part, depth + 1)
        else:
            setattr(message, field.name, scalar(rng, field))


def generate(types, count):
    rng = random.Random(49983)
    names = sorted(types)
    for n in range(count):
        name = names[n % len(names)]
        message = types[name]()
        fill(rng, message)
        text = json_format.MessageToJson(message, indent=None)
        line = {"type": name, "json": text, "hex": message.SerializeToString().hex()}
        print(json.dumps(line))


def check(types):
    count = 0
    for line in sys.stdin:
        case = json.loads(line)
        kind = types[case["type"]]
        original = kind.FromString(bytes.fromhex(case["original"]))
        # Strict: a field that the contract does not have is an error here.
        by_json = json_format.Parse(case["json"], kind())
        by_bytes = kind.FromString(bytes.fromhex(case["hex"]))
        for how, ours in (("JSON", by_json), ("binary", by_bytes)):
            if ours != original:
                raise SystemExit(f"{case['type']}: our {how} says\n{ours}instead of\n{original}")
        count += 1
    print(count)


def main():
    types = load(sys.argv[1])
    if sys.argv[2] == "generate":
        generate(types, int(sys.argv[3]))
    else:
        check(types)


main()
