// SPDX-License-Identifier: Apache-2.0

package netpol

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// Longest name and label (RFC 1035, 2.3.4), without the final dot.
const (
	maxName  = 253
	maxLabel = 63
)

// ParsePattern reads an fqdn of a policy: a name, or a name behind "*.", which
// stands for one label, or "**.", which stands for one or more. It answers the
// pattern in lower case and without a final dot. Names are ASCII: letters,
// digits, '-' and '_'; others are written in their xn-- form.
func ParsePattern(s string) (string, error) {
	pattern := strings.ToLower(strings.TrimSuffix(s, "."))
	name := pattern
	for _, wild := range []string{"*", "**"} {
		if pattern == wild {
			return "", errors.New("would match every name: write the domain behind it, as in *.example.com")
		}
		if rest, ok := strings.CutPrefix(pattern, wild+"."); ok {
			name = rest
		}
	}
	if _, err := netip.ParseAddr(name); err == nil {
		return "", fmt.Errorf("is an address: use cidr")
	}
	if err := checkName(name); err != nil {
		return "", err
	}
	if len(pattern) > maxName {
		return "", fmt.Errorf("is %d bytes long, at most %d are allowed", len(pattern), maxName)
	}
	return pattern, nil
}

// checkName says what is wrong with a name in lower case.
func checkName(name string) error {
	if name == "" {
		return errors.New("is empty")
	}
	for label := range strings.SplitSeq(name, ".") {
		switch {
		case label == "":
			return errors.New("has an empty label (a dot at the start, or two together)")
		case len(label) > maxLabel:
			return fmt.Errorf("has a label of %d bytes, at most %d are allowed", len(label), maxLabel)
		case strings.Contains(label, "*"):
			return errors.New("has a * that is not a whole label in front: *.example.com stands for one label, **.example.com for one or more")
		case label[0] == '-' || label[len(label)-1] == '-':
			return fmt.Errorf("has the label %q, which begins or ends with -", clip(label))
		}
		for _, c := range label {
			switch {
			case c >= 'a' && c <= 'z', c >= '0' && c <= '9', c == '-', c == '_':
			case c > 127:
				return fmt.Errorf("has the character %q: write the name in ASCII, its labels as xn--... (punycode)", c)
			default:
				return fmt.Errorf("has the character %q: a name is letters, digits, '-', '_' and dots", c)
			}
		}
	}
	return nil
}

// ownSuffixes are the top-level names that no registry sells: networks use
// them for themselves.
var ownSuffixes = []string{"corp", "example", "home", "internal", "intranet", "invalid", "lan", "local", "localdomain", "private", "test"}

// openToAll says whether a pattern stands for the names of a public top-level
// domain.
func openToAll(pattern string) bool {
	wild, rest := splitPattern(pattern)
	return wild != "" && !strings.Contains(rest, ".") && !slices.Contains(ownSuffixes, rest)
}

// splitPattern parts a pattern into "", "*" or "**", and the name behind it.
func splitPattern(pattern string) (wild, rest string) {
	switch {
	case strings.HasPrefix(pattern, "**."):
		return "**", pattern[3:]
	case strings.HasPrefix(pattern, "*."):
		return "*", pattern[2:]
	}
	return "", pattern
}

// MatchName says whether a pattern matches a name, which is in lower case and
// has no final dot.
func MatchName(pattern, name string) bool {
	wild, _ := splitPattern(pattern)
	if wild == "" {
		return pattern == name
	}
	front, ok := strings.CutSuffix(name, pattern[len(wild):])
	return ok && front != "" && (wild == "**" || !strings.Contains(front, "."))
}

// patternCovers says whether a matches every name that b matches.
func patternCovers(a, b string) bool {
	wildA, restA := splitPattern(a)
	wildB, restB := splitPattern(b)
	switch {
	case wildB == "":
		return MatchName(a, b)
	case wildA == "":
		return false
	case restA == restB:
		return wildA == "**" || wildB == "*"
	}
	return wildA == "**" && strings.HasSuffix(restB, "."+restA)
}
