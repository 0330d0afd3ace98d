// SPDX-License-Identifier: Apache-2.0

package tenant

import (
	"errors"
	"fmt"
	"math/big"
	"strings"
)

// ParseSize reads a number of bytes: 4096, 512MiB, 1.5GiB. The units are B,
// KiB, MiB, GiB and TiB, in steps of 1024; Ki or k, Mi or m and so on mean
// the same, as in Kubernetes and Docker. KB, MB, GB and TB are refused,
// because half the world means 1000 by them. A fraction must come out as
// whole bytes. What zero means is the caller's to say.
func ParseSize(s string) (int64, error) {
	number, unit := splitUnit(s)
	factor, ok := sizeUnits[strings.ToLower(unit)]
	if !ok {
		if binary, decimal := decimalUnits[strings.ToLower(unit)]; decimal {
			return 0, fmt.Errorf("size %q: %s is ambiguous, write %s%s for steps of 1024", clip(s), unit, number, binary)
		}
		return 0, fmt.Errorf("size %q: write a number and one of B, KiB, MiB, GiB, TiB, as in 512MiB", clip(s))
	}
	n, err := scale(number, factor)
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

// ParseCPU reads a share of CPUs in thousandths: 4, 0.5 or 500m. Anything
// finer than a thousandth is refused. What zero means is the caller's to say.
func ParseCPU(s string) (millis int64, err error) {
	number, unit := splitUnit(s)
	var factor int64
	switch unit {
	case "":
		factor = 1000
	case "m":
		factor = 1
	default:
		return 0, fmt.Errorf("cpu %q: write a number of CPUs, as in 2 or 0.5, or thousandths, as in 500m", clip(s))
	}
	millis, err = scale(number, factor)
	if err != nil {
		return 0, fmt.Errorf("cpu %q: %w", clip(s), err)
	}
	return millis, nil
}

// splitUnit parts a quantity where the digits end. One space is allowed.
func splitUnit(s string) (number, unit string) {
	i := len(s) - len(strings.TrimLeft(s, "0123456789."))
	return s[:i], strings.TrimPrefix(s[i:], " ")
}

// scale multiplies a decimal number exactly.
func scale(number string, factor int64) (int64, error) {
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

// clip shortens what somebody wrote before it goes into a message.
func clip(s string) string {
	if r := []rune(s); len(r) > 60 {
		return string(r[:60]) + "..."
	}
	return s
}
