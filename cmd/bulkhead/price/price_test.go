// SPDX-License-Identifier: Apache-2.0

package price

import (
	"math/big"
	"math/rand/v2"
	"os"
	"strings"
	"testing"
)

func TestSampleIsRead(t *testing.T) {
	const file = "../../../deploy/examples/prices.toml"
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	l, err := Parse(file, data)
	if err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		tenant, meter string
		total         int64
		row           string
	}{
		{"umbra", "cpu_ns", 3_600_000_000_000, "0.048000"},
		{"acme", "egress_bytes", 1_000_000_000, "0.080000"},
		{"acme/vision", "egress_bytes", 1_000_000_000, "0.050000"},
		{"acme/vision/train", "egress_bytes", 1_000_000_000, "0.050000"},
		{"acme/visions", "egress_bytes", 1_000_000_000, "0.080000"},
		{"acme/vision/train", "mem_mib_ms", 3_686_400_000, "0.006000"},
		{"acme", "ingress_bytes", 1 << 50, "0.000000"},
		{"acme", "egress_bytes", 1, "0.000000"},
	} {
		cost, ok := l.Cost(test.tenant, test.meter, big.NewInt(test.total))
		if !ok || l.Row(cost) != test.row {
			t.Errorf("%s %s %d: got %v %v, want %s", test.tenant, test.meter, test.total, l.Row(cost), ok, test.row)
		}
	}
	if _, ok := l.Cost("acme", "wall_ms", big.NewInt(1)); ok {
		t.Error("wall_ms has no price in the sample")
	}
	// A billion records of one byte cost what one record of a billion bytes does.
	one, _ := l.Cost("acme", "egress_bytes", big.NewInt(1))
	sum := new(big.Rat).Mul(one, new(big.Rat).SetInt64(1_000_000_000))
	if got := l.Total(sum); got != "0.08" {
		t.Errorf("got %s, want 0.08", got)
	}
}

// However usage is cut into rows, the unrounded sum is that of the whole.
func TestCostIsAdditive(t *testing.T) {
	l, err := Parse("p.toml", []byte("currency = \"X\"\n[meters.cpu_ns]\nprice = \"0.0481333\"\nper = \"core-hour\"\n"))
	if err != nil {
		t.Fatal(err)
	}
	for seed := range uint64(200) {
		rng := rand.New(rand.NewPCG(seed, 2))
		sum, whole := new(big.Rat), new(big.Int)
		for range 1 + rng.IntN(20) {
			n := new(big.Int).SetUint64(rng.Uint64() >> rng.IntN(64))
			cost, _ := l.Cost("a", "cpu_ns", n)
			sum.Add(sum, cost)
			whole.Add(whole, n)
		}
		want, _ := l.Cost("a", "cpu_ns", whole)
		if sum.Cmp(want) != 0 {
			t.Fatalf("seed %d: got %s, want %s", seed, sum, want)
		}
	}
}

func TestParseRefuses(t *testing.T) {
	const head = "currency = \"EUR\"\n"
	for _, test := range []struct{ name, file, text, want string }{
		{"no currency", "p.toml", "", `p.toml: currency is missing`},
		{"unknown key", "p.toml", head + "decimal = 3\n", `p.toml:2: unknown key "decimal" (did you mean decimals?)`},
		{"unknown key of a meter", "p.toml", head + "[meters.cpu_ns]\nprice = \"1\"\nfor = \"core-hour\"\n", `p.toml:4: unknown key "for"`},
		{"unknown meter", "p.toml", head + "[meters.cpu_nss]\nprice = \"1\"\nper = \"core-hour\"\n", `p.toml: meters.cpu_nss: no such meter (did you mean cpu_ns?)`},
		{"no unit", "p.toml", head + "[meters.cpu_ns]\nprice = \"1\"\n", `p.toml: meters.cpu_ns: per is "", want one of: core-hour, core-minute, core-second`},
		{"float", "p.toml", head + "[meters.cpu_ns]\nprice = 0.1\nper = \"core-hour\"\n", `p.toml:3: write the price in quotes`},
		{"negative", "p.toml", head + "[meters.cpu_ns]\nprice = \"-1\"\nper = \"core-hour\"\n", `"-1" is not a decimal number`},
		{"fraction", "p.toml", head + "[meters.cpu_ns]\nprice = \"1/3\"\nper = \"core-hour\"\n", `"1/3" is not a decimal number`},
		{"exponent", "p.toml", head + "[meters.cpu_ns]\nprice = \"1e999999999\"\nper = \"core-hour\"\n", `is not a decimal number`},
		{"decimals", "p.toml", head + "decimals = 40\n", `p.toml: decimals is 40, want 0 to 12`},
		{"tenant", "p.toml", head + "[tenants.Acme.cpu_ns]\nprice = \"1\"\nper = \"core-hour\"\n", `upper-case`},
		{"syntax", "p.toml", head + "[meters\n", `p.toml:2: `},
		{"twice", "p.toml", head + head, `p.toml:2: `},
		{"yaml unknown key", "p.yaml", "currency: EUR\nmeter: {}\n", `p.yaml:2: unknown key "meter" (did you mean meters?)`},
		{"yaml syntax", "p.yml", "currency: [\n", `p.yml: line 1`},
		{"yaml type", "p.yaml", "currency: EUR\nmeters: 3\n", `p.yaml: line 2`},
		{"yaml twice", "p.yaml", "currency: EUR\n---\ncurrency: USD\n", `p.yaml: more than one document`},
		{"yaml empty", "p.yaml", "", `p.yaml: the file is empty`},
	} {
		t.Run(test.name, func(t *testing.T) {
			_, err := Parse(test.file, []byte(test.text))
			if err == nil || !strings.Contains(err.Error(), test.want) || strings.Contains(err.Error(), "\n") {
				t.Errorf("got %v, want %s", err, test.want)
			}
		})
	}
}

func TestAmount(t *testing.T) {
	for _, test := range []struct{ meter, total, amount, exact string }{
		{"cpu_ns", "200000000", "0.000056 core-hours", "200000000 ns"},
		{"egress_bytes", "1536", "1.5KiB", "1536 bytes"},
		{"mem_mib_ms", "36864000000000000", "10000000.000000 GiB-hours", "36864000000000000 MiB ms"},
		{"gpu_slice_ms", "7", "7", "7"},
	} {
		n, _ := new(big.Int).SetString(test.total, 10)
		if a, e := Amount(test.meter, n), Exact(test.meter, n); a != test.amount || e != test.exact {
			t.Errorf("%s %s: got %q, %q, want %q, %q", test.meter, test.total, a, e, test.amount, test.exact)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add("p.toml", "currency = \"EUR\"\n[meters.cpu_ns]\nprice = \"1\"\nper = \"core-hour\"\n")
	f.Add("p.yaml", "currency: EUR\nmeters: {cpu_ns: {price: 0.1, per: core-hour}}\n")
	f.Fuzz(func(t *testing.T, name, text string) {
		l, err := Parse(name, []byte(text))
		if err != nil {
			return
		}
		if cost, ok := l.Cost("acme", "cpu_ns", big.NewInt(1<<40)); ok && cost.Sign() < 0 {
			t.Errorf("negative cost %s", cost)
		}
	})
}
