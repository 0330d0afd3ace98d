// SPDX-License-Identifier: Apache-2.0

package netpol

import (
	"errors"
	"fmt"
	"math/big"
	"strings"
)

// maxRate in bits a second: no interface of a node is faster.
const maxRate = 400_000_000_000

// ParseSize reads a number of bytes: 4096, 512MiB, 1.5GiB. The units are B,
// KiB, MiB, GiB and TiB, in steps of 1024; Ki or k, Mi or m and so on mean
// the same, as in Kubernetes and Docker. KB, MB, GB and TB are refused,
// because half the world means 1000 by them. A fraction must come out as
// whole bytes. What zero means is the caller's to say.
func ParseSize(s string) (int64, error) {
	number, unit := SplitUnit(s)
	factor, ok := sizeUnits[strings.ToLower(unit)]
	if !ok {
		if binary, decimal := decimalUnits[strings.ToLower(unit)]; decimal {
			return 0, fmt.Errorf("size %q: %s is ambiguous, write %s%s for steps of 1024", clip(s), unit, number, binary)
		}
		return 0, fmt.Errorf("size %q: write a number and one of B, KiB, MiB, GiB, TiB, as in 512MiB", clip(s))
	}
	n, err := Scale(number, factor)
	if err != nil {
		return 0, fmt.Errorf("size %q: %w", clip(s), err)
	}
	return n, nil
}

var sizeUnits = map[string]int64{
	"": 1, "b": 1,
	"k": 1 << 10, "ki": 1 << 10, "kib": 1 << 10,
	"m": 1 << 20, "mi": 1 << 20, "mib": 1 << 20,
	"g": 1 << 30, "gi": 1 << 30, "gib": 1 << 30,
	"t": 1 << 40, "ti": 1 << 40, "tib": 1 << 40,
}

var decimalUnits = map[string]string{"kb": "KiB", "mb": "MiB", "gb": "GiB", "tb": "TiB"}

// rateUnits are in steps of 1000, as everywhere where bits are sold.
var rateUnits = map[string]int64{"kbit": 1_000, "Mbit": 1_000_000, "Gbit": 1_000_000_000}

// ParseRate reads a speed in bits a second: 512kbit, 100Mbit, 2.5Gbit. It must
// come out as whole bits, from 8 kbit to 400 Gbit.
func ParseRate(s string) (uint64, error) {
	number, unit := SplitUnit(s)
	factor, ok := rateUnits[unit]
	if !ok {
		for known := range rateUnits {
			if strings.EqualFold(known, unit) {
				return 0, fmt.Errorf("rate %q: write %s%s", clip(s), number, known)
			}
		}
		return 0, fmt.Errorf("rate %q: write a number and one of kbit, Mbit, Gbit (a second), as in 100Mbit", clip(s))
	}
	n, err := Scale(number, factor)
	switch {
	case err != nil:
		return 0, fmt.Errorf("rate %q: %w", clip(s), err)
	case n < MinRate, n > maxRate:
		return 0, fmt.Errorf("rate %q: must be from %s to %s", clip(s), FormatRate(MinRate), FormatRate(maxRate))
	}
	return uint64(n), nil
}

// FormatRate writes bits a second as ParseRate reads them.
func FormatRate(bits uint64) string {
	unit, factor := "kbit", int64(1_000)
	switch {
	case bits >= 1_000_000_000:
		unit, factor = "Gbit", 1_000_000_000
	case bits >= 1_000_000:
		unit, factor = "Mbit", 1_000_000
	}
	return decimal(bits, factor) + unit
}

// FormatSize writes bytes exactly, as ParseSize reads them: in the largest unit
// that takes no more than two decimals.
func FormatSize(bytes uint64) string {
	for _, u := range []struct {
		name   string
		factor uint64
	}{{"TiB", 1 << 40}, {"GiB", 1 << 30}, {"MiB", 1 << 20}, {"KiB", 1 << 10}} {
		if bytes >= u.factor && bytes%(u.factor/4) == 0 {
			return decimal(bytes, int64(u.factor)) + u.name
		}
	}
	return fmt.Sprintf("%dB", bytes)
}

// decimal divides exactly what has at most nine decimals.
func decimal(n uint64, factor int64) string {
	r := new(big.Rat).SetFrac(new(big.Int).SetUint64(n), big.NewInt(factor))
	s := r.FloatString(9)
	return strings.TrimSuffix(strings.TrimRight(s, "0"), ".")
}

// SplitUnit parts a quantity where the digits end. One space is allowed.
func SplitUnit(s string) (number, unit string) {
	i := len(s) - len(strings.TrimLeft(s, "0123456789."))
	return s[:i], strings.TrimPrefix(s[i:], " ")
}

// Scale multiplies a decimal number exactly.
func Scale(number string, factor int64) (int64, error) {
	whole, fraction, dotted := strings.Cut(number, ".")
	if whole == "" || dotted && fraction == "" || strings.Contains(fraction, ".") || len(number) > 30 {
		return 0, errors.New("has no number that can be read")
	}
	r, ok := new(big.Rat).SetString(number)
	if !ok {
		return 0, errors.New("has no number that can be read")
	}
	r.Mul(r, new(big.Rat).SetInt64(factor))
	switch {
	case !r.IsInt():
		return 0, errors.New("is finer than can be counted")
	case !r.Num().IsInt64():
		return 0, errors.New("is too large")
	}
	return r.Num().Int64(), nil
}
