// SPDX-License-Identifier: Apache-2.0

package usagev1

import (
	"bytes"
	"encoding/hex"
	"errors"
	"math"
	"strings"
	"testing"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
)

func sample() *Record {
	return &Record{
		Source: "node/n1/boot/b1", Id: "abcdefgh2345/cpu_ns/1/7", NodeSeq: 7,
		PrevHash: bytes.Repeat([]byte{1}, HashLen),
		Tenant:   "acme/vision", Sandbox: "abcdefgh2345", WorkloadRef: "job-9", PolicyRev: 3,
		Meter: MeterCPU, StartNs: 100, EndNs: 200, MonoNs: 101, Delta: 5, Cumulative: 50,
		Resource: &Resource{GpuUuid: "GPU-1", MigUuid: "MIG-1", Profile: "1g.10gb", FractionNum: 1, FractionDen: 7},
		Quality:  Quality_QUALITY_MEASURED, Corrects: "abcdefgh2345/cpu_ns/1/6", SandboxName: "web",
	}
}

// The hash of a fixed record must never change: ledgers are checked with it.
func TestHashIsFixed(t *testing.T) {
	r := sample()
	r.Hash = Hash(r.PrevHash, r)
	got := hex.EncodeToString(r.Hash)
	const want = "c7773ff3c6ed8d7aaae456fa4e06346774ceee02fe3dc94b57cb3925fb60b58a"
	if got != want {
		t.Errorf("hash is %s, want %s", got, want)
	}
	bare := &Record{}
	const wantLen = 16 + 9*4 + 8*8 + 1 // version, texts, numbers, no resource
	if got := len(CanonicalBytes(bare)); got != wantLen {
		t.Errorf("canonical bytes of an empty record: %d, want %d", got, wantLen)
	}
}

// Every field of the message but hash changes the canonical bytes, fields added later too.
func TestCanonicalBytesCoverEveryField(t *testing.T) {
	base := CanonicalBytes(sample())
	seen := map[string]string{string(base): "nothing"}
	check := func(name string, r *Record) {
		t.Helper()
		b := string(CanonicalBytes(r))
		if other, dup := seen[b]; dup {
			t.Errorf("changing %s gives the same bytes as changing %s", name, other)
		}
		seen[b] = name
	}
	fields := (&Record{}).ProtoReflect().Descriptor().Fields()
	for i := range fields.Len() {
		fd := fields.Get(i)
		r := sample()
		switch fd.Name() {
		case "hash":
			r.Hash = []byte("x")
			if !bytes.Equal(CanonicalBytes(r), base) {
				t.Error("hash is part of what is hashed")
			}
			continue
		case "resource":
			r.Resource = nil
			check("resource", r)
			sub := fd.Message().Fields()
			for j := range sub.Len() {
				r := sample()
				change(r.Resource.ProtoReflect(), sub.Get(j))
				check("resource."+string(sub.Get(j).Name()), r)
			}
			continue
		}
		change(r.ProtoReflect(), fd)
		check(string(fd.Name()), r)
	}
}

func change(m protoreflect.Message, fd protoreflect.FieldDescriptor) {
	switch fd.Kind() {
	case protoreflect.StringKind:
		m.Set(fd, protoreflect.ValueOfString(m.Get(fd).String()+"x"))
	case protoreflect.BytesKind:
		m.Set(fd, protoreflect.ValueOfBytes(append(bytes.Clone(m.Get(fd).Bytes()), 'x')))
	case protoreflect.Uint64Kind:
		m.Set(fd, protoreflect.ValueOfUint64(m.Get(fd).Uint()+1))
	case protoreflect.Uint32Kind:
		m.Set(fd, protoreflect.ValueOfUint32(uint32(m.Get(fd).Uint()+1)))
	case protoreflect.Int64Kind:
		m.Set(fd, protoreflect.ValueOfInt64(m.Get(fd).Int()+1))
	case protoreflect.EnumKind:
		m.Set(fd, protoreflect.ValueOfEnum(m.Get(fd).Enum()+1))
	default:
		panic("a field of a kind that the test does not know: " + fd.Name())
	}
}

// Moving a byte from one text to the next must not give the same bytes.
func TestCanonicalBytesAreUnambiguous(t *testing.T) {
	a, b := sample(), sample()
	a.Tenant, a.Sandbox = "ab", "c"
	b.Tenant, b.Sandbox = "a", "bc"
	if bytes.Equal(CanonicalBytes(a), CanonicalBytes(b)) {
		t.Error("two records have the same canonical bytes")
	}
}

func TestVerifyChain(t *testing.T) {
	first := sample()
	first.NodeSeq, first.PrevHash = 1, ZeroHash()
	first.Hash = Hash(ZeroHash(), first)
	if err := VerifyChain(0, ZeroHash(), first); err != nil {
		t.Fatal(err)
	}
	second := sample()
	second.NodeSeq, second.PrevHash = 2, first.Hash
	second.Hash = Hash(first.Hash, second)
	if err := VerifyChain(1, first.Hash, second); err != nil {
		t.Fatal(err)
	}
	for name, breakIt := range map[string]func(r *Record){
		"sequence skips":  func(r *Record) { r.NodeSeq = 3 },
		"other prev_hash": func(r *Record) { r.PrevHash = ZeroHash() },
		"delta changed":   func(r *Record) { r.Delta++ },
		"hash changed":    func(r *Record) { r.Hash[0]++ },
		"hash missing":    func(r *Record) { r.Hash = nil },
	} {
		r := proto.CloneOf(second)
		breakIt(r)
		if err := VerifyChain(1, first.Hash, r); !errors.Is(err, ErrChain) {
			t.Errorf("%s: got %v, want ErrChain", name, err)
		}
	}
}

func TestValidate(t *testing.T) {
	if err := Validate(sample()); err != nil {
		t.Fatal(err)
	}
	bare := sample()
	bare.NodeSeq, bare.PrevHash, bare.Hash, bare.Resource, bare.Corrects = 0, nil, nil, nil, ""
	bare.WorkloadRef, bare.SandboxName, bare.EndNs, bare.MonoNs, bare.Delta = "", "", bare.StartNs, 0, 0
	if err := Validate(bare); err != nil {
		t.Fatalf("as the meter makes it: %v", err)
	}
	unknown := sample()
	unknown.Meter, unknown.Id = "gpu_slice_ms", "abcdefgh2345/gpu_slice_ms/1/7"
	if err := Validate(unknown); err != nil {
		t.Fatalf("a meter of a newer node: %v", err)
	}

	long := strings.Repeat("x", 5000)
	for name, breakIt := range map[string]func(r *Record){
		"source empty":      func(r *Record) { r.Source = "" },
		"source shape":      func(r *Record) { r.Source = "node/a/b" },
		"source slash":      func(r *Record) { r.Source = "node/a/boot/" },
		"source space":      func(r *Record) { r.Source = "node/a b/boot/c" },
		"source long":       func(r *Record) { r.Source = "node/" + long + "/boot/b" },
		"id empty":          func(r *Record) { r.Id = "" },
		"id shape":          func(r *Record) { r.Id = "abcdefgh2345/cpu_ns/1" },
		"id zero sequence":  func(r *Record) { r.Id = "abcdefgh2345/cpu_ns/1/0" },
		"id leading zero":   func(r *Record) { r.Id = "abcdefgh2345/cpu_ns/1/07" },
		"id sign":           func(r *Record) { r.Id = "abcdefgh2345/cpu_ns/+1/7" },
		"id other sandbox":  func(r *Record) { r.Id = "aaaaaaaaaaaa/cpu_ns/1/7" },
		"id other meter":    func(r *Record) { r.Id = "abcdefgh2345/wall_ms/1/7" },
		"id long":           func(r *Record) { r.Id = long },
		"sandbox short":     func(r *Record) { r.Sandbox, r.Id = "abc", "abc/cpu_ns/1/7" },
		"sandbox alphabet":  func(r *Record) { r.Sandbox, r.Id = "abcdefgh1890", "abcdefgh1890/cpu_ns/1/7" },
		"meter name":        func(r *Record) { r.Meter, r.Id = "CPU", "abcdefgh2345/CPU/1/7" },
		"tenant empty":      func(r *Record) { r.Tenant = "" },
		"tenant long":       func(r *Record) { r.Tenant = long },
		"tenant not UTF-8":  func(r *Record) { r.Tenant = "a\xff" },
		"workload long":     func(r *Record) { r.WorkloadRef = long },
		"name long":         func(r *Record) { r.SandboxName = long },
		"profile long":      func(r *Record) { r.Resource.Profile = long },
		"corrects shape":    func(r *Record) { r.Corrects = "x" },
		"ends early":        func(r *Record) { r.EndNs = r.StartNs - 1 },
		"duration negative": func(r *Record) { r.MonoNs = -1 },
		"cumulative less":   func(r *Record) { r.Delta, r.Cumulative = math.MaxUint64, 1 },
		"no quality":        func(r *Record) { r.Quality = 0 },
		"quality unknown":   func(r *Record) { r.Quality = 77 },
		"quality negative":  func(r *Record) { r.Quality = -1 },
		"gap with delta":    func(r *Record) { r.Quality = Quality_QUALITY_GAP },
		"prev_hash short":   func(r *Record) { r.PrevHash = []byte{1} },
		"hash short":        func(r *Record) { r.Hash = []byte{1} },
		"fraction":          func(r *Record) { r.Resource.FractionNum = 8 },
		"fraction of zero":  func(r *Record) { r.Resource.FractionDen = 0 },
		"unknown field": func(r *Record) {
			r.ProtoReflect().SetUnknown(protowire.AppendVarint(protowire.AppendTag(nil, 99, protowire.VarintType), 1))
		},
		"unknown resource part": func(r *Record) {
			r.Resource.ProtoReflect().SetUnknown(protowire.AppendVarint(protowire.AppendTag(nil, 99, protowire.VarintType), 1))
		},
	} {
		r := sample()
		breakIt(r)
		if err := Validate(r); !errors.Is(err, ErrInvalid) {
			t.Errorf("%s: got %v, want ErrInvalid", name, err)
		}
	}
	if err := Validate(nil); !errors.Is(err, ErrInvalid) {
		t.Errorf("nil: got %v", err)
	}
}

func TestSourceRoundTrip(t *testing.T) {
	node, boot, err := ParseSource(Source("5f0c-1", "b_2"))
	if err != nil || node != "5f0c-1" || boot != "b_2" {
		t.Errorf("got %q %q %v", node, boot, err)
	}
}

func FuzzParseID(f *testing.F) {
	f.Add("abcdefgh2345/cpu_ns/1/7")
	f.Add("abcdefgh2345/cpu_ns/18446744073709551615/18446744073709551615")
	f.Add("///")
	f.Fuzz(func(t *testing.T, s string) {
		id, err := ParseID(s)
		if err == nil && id.String() != s {
			t.Errorf("%q is read as %q", s, id)
		}
	})
}

func BenchmarkHash(b *testing.B) {
	r, prev := sample(), ZeroHash()
	for b.Loop() {
		Hash(prev, r)
	}
}
