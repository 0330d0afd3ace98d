// SPDX-License-Identifier: Apache-2.0

// Package price knows what the meters' integers are in human units and what
// they cost under a file of prices.
//
// All arithmetic is exact (math/big.Rat). A cost is rounded once, when it is
// printed, half away from zero; totals are sums of unrounded costs, so they may
// differ in the last digit from the sum of the printed rows. Bulkhead itself
// never bills: the ledger's integers are what counts, prices are the caller's.
package price

import (
	"math/big"
	"slices"

	"github.com/docker/go-units"
)

// unit is one way of writing a meter for people.
type unit struct {
	name   string
	amount int64 // how many of the meter's own unit it is
	over   int64 // divides amount where that is no whole number; 0 is 1
}

const (
	second = 1_000_000_000 // in ns
)

// meter describes one meter of usage records.
type meter struct {
	base  string // the meter's own unit, as printed after the exact integer
	units []unit // what a price may be for; the first is the one that is printed
}

var meters = map[string]meter{
	"cpu_ns":          {"ns", []unit{{name: "core-hour", amount: 3600 * second}, {name: "core-minute", amount: 60 * second}, {name: "core-second", amount: second}}},
	"mem_mib_ms":      {"MiB ms", memoryUnits},
	"mem_used_mib_ms": {"MiB ms", memoryUnits},
	"egress_bytes":    {"bytes", byteUnits},
	"ingress_bytes":   {"bytes", byteUnits},
	"wall_ms":         {"ms", []unit{{name: "hour", amount: 3_600_000}, {name: "minute", amount: 60_000}, {name: "second", amount: 1000}}},
}

var memoryUnits = []unit{{name: "GiB-hour", amount: 1024 * 3_600_000}, {name: "GB-hour", amount: 1e9 * 3_600_000, over: 1 << 20}, {name: "GiB-second", amount: 1024 * 1000}}

var byteUnits = []unit{{name: "GiB", amount: 1 << 30}, {name: "GB", amount: 1e9}, {name: "MiB", amount: 1 << 20}, {name: "MB", amount: 1e6}, {name: "TiB", amount: 1 << 40}, {name: "TB", amount: 1e12}}

// Amount is total for people: "2.500000 core-hours", "1.5GiB". A meter that
// this version does not know is given as its integer.
func Amount(name string, total *big.Int) string {
	m, known := meters[name]
	switch {
	case !known:
		return total.String()
	case m.base == "bytes":
		bytes, _ := new(big.Float).SetInt(total).Float64()
		return units.BytesSize(bytes)
	}
	u := m.units[0]
	return quotient(total, u).FloatString(6) + " " + u.name + "s"
}

// Exact is total as the integer it is, with the meter's own unit.
func Exact(name string, total *big.Int) string {
	if m, known := meters[name]; known {
		return total.String() + " " + m.base
	}
	return total.String()
}

func quotient(total *big.Int, u unit) *big.Rat {
	r := new(big.Rat).SetFrac(total, big.NewInt(u.amount))
	return r.Mul(r, new(big.Rat).SetInt64(max(u.over, 1)))
}

// Meters names the meters that can have a price.
func Meters() []string {
	var out []string
	for name := range meters {
		out = append(out, name)
	}
	slices.Sort(out)
	return out
}
