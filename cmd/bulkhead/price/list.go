// SPDX-License-Identifier: Apache-2.0

package price

import (
	"errors"
	"fmt"
	"io"
	"math/big"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/agext/levenshtein"
	"github.com/pelletier/go-toml/v2"
	"go.yaml.in/yaml/v3"

	"github.com/bulkheadhq/bulkhead/tenant"
)

// List is a file of prices.
type List struct {
	Currency string
	Decimals int // of totals

	base    map[string]rate
	tenants map[tenant.Path]map[string]rate
}

type rate struct {
	price *big.Rat
	unit  unit
}

// file is the form on disk; see deploy/examples/prices.toml.
type file struct {
	Currency string                      `toml:"currency" yaml:"currency"`
	Decimals *int                        `toml:"decimals" yaml:"decimals"`
	Meters   map[string]entry            `toml:"meters" yaml:"meters"`
	Tenants  map[string]map[string]entry `toml:"tenants" yaml:"tenants"`
}

type entry struct {
	Price string `toml:"price" yaml:"price"`
	Per   string `toml:"per" yaml:"per"`
}

// Parse reads a list of prices, YAML if the name ends in .yaml or .yml, else
// TOML. An unknown key, an unknown meter or a price that is not an exact
// decimal is an error that names the file and what to write instead.
func Parse(name string, data []byte) (*List, error) {
	f, err := decode(name, data)
	if err != nil {
		return nil, err
	}
	l := &List{Currency: f.Currency, Decimals: 2, tenants: map[tenant.Path]map[string]rate{}}
	if f.Currency == "" {
		return nil, fmt.Errorf(`%s: currency is missing, as in currency = "EUR"`, name)
	}
	if f.Decimals != nil {
		if l.Decimals = *f.Decimals; l.Decimals < 0 || l.Decimals > 12 {
			return nil, fmt.Errorf("%s: decimals is %d, want 0 to 12", name, l.Decimals)
		}
	}
	if l.base, err = rates(name, "meters", f.Meters); err != nil {
		return nil, err
	}
	for t, m := range f.Tenants {
		path, err := tenant.ParsePath(t)
		if err != nil {
			return nil, fmt.Errorf("%s: tenants: %w", name, err)
		}
		if l.tenants[path], err = rates(name, "tenants."+t, m); err != nil {
			return nil, err
		}
	}
	return l, nil
}

func rates(name, table string, entries map[string]entry) (map[string]rate, error) {
	out := map[string]rate{}
	for m, e := range entries {
		key := name + ": " + table + "." + m
		known, ok := meters[m]
		if !ok {
			return nil, fmt.Errorf("%s: no such meter%s", key, nearest(m, Meters()))
		}
		var names []string
		for _, u := range known.units {
			names = append(names, u.name)
		}
		i := slices.Index(names, e.Per)
		if i < 0 {
			return nil, fmt.Errorf("%s: per is %q, want one of: %s", key, e.Per, strings.Join(names, ", "))
		}
		price, err := decimal(e.Price)
		if err != nil {
			return nil, fmt.Errorf("%s: price: %w", key, err)
		}
		out[m] = rate{price, known.units[i]}
	}
	return out, nil
}

var decimalForm = regexp.MustCompile(`^[0-9]{1,30}(\.[0-9]{1,30})?$`)

func decimal(s string) (*big.Rat, error) {
	if !decimalForm.MatchString(s) {
		return nil, fmt.Errorf("%q is not a decimal number such as \"0.0480\"", s)
	}
	r, _ := new(big.Rat).SetString(s)
	return r, nil
}

// Cost is the exact cost of total, or false if the meter has no price for this
// tenant. The price of the nearest ancestor that has one wins, then the list's
// own.
func (l *List) Cost(path, meterName string, total *big.Int) (*big.Rat, bool) {
	for p := tenant.Path(path); p != ""; p = p.Parent() {
		if r, ok := l.tenants[p][meterName]; ok {
			return r.cost(total), true
		}
	}
	r, ok := l.base[meterName]
	if !ok {
		return nil, false
	}
	return r.cost(total), true
}

func (r rate) cost(total *big.Int) *big.Rat {
	q := quotient(total, r.unit)
	return q.Mul(q, r.price)
}

// Total writes a total with the list's decimals, Row one row's cost with four
// more, because a row is often less than a cent.
func (l *List) Total(cost *big.Rat) string { return cost.FloatString(l.Decimals) }

// Row writes the cost of one row.
func (l *List) Row(cost *big.Rat) string { return cost.FloatString(l.Decimals + 4) }

func decode(name string, data []byte) (file, error) {
	var f file
	if ext := filepath.Ext(name); ext == ".yaml" || ext == ".yml" {
		err := decodeYAML(name, data, &f)
		return f, err
	}
	dec := toml.NewDecoder(strings.NewReader(string(data))).DisallowUnknownFields()
	err := dec.Decode(&f)
	var strict *toml.StrictMissingError
	if errors.As(err, &strict) && len(strict.Errors) > 0 {
		first := strict.Errors[0]
		row, _ := first.Position()
		return f, unknownKey(name, row, first.Key()[len(first.Key())-1])
	}
	var at *toml.DecodeError
	if errors.As(err, &at) {
		row, _ := at.Position()
		msg := strings.TrimPrefix(at.Error(), "toml: ")
		if strings.HasSuffix(strings.Join(at.Key(), "."), "price") {
			msg = `write the price in quotes, as in price = "0.0480", so that it stays exact`
		}
		return f, fmt.Errorf("%s:%d: %s", name, row, msg)
	}
	if err != nil {
		return f, fmt.Errorf("%s: %w", name, err)
	}
	return f, nil
}

var yamlUnknown = regexp.MustCompile(`^line (\d+): field (\S+) not found`)

func decodeYAML(name string, data []byte, f *file) error {
	dec := yaml.NewDecoder(strings.NewReader(string(data)))
	dec.KnownFields(true)
	err := dec.Decode(f)
	var te *yaml.TypeError
	if errors.As(err, &te) && len(te.Errors) > 0 {
		if m := yamlUnknown.FindStringSubmatch(te.Errors[0]); m != nil {
			row, _ := strconv.Atoi(m[1])
			return unknownKey(name, row, m[2])
		}
		return fmt.Errorf("%s: %s", name, te.Errors[0])
	}
	switch {
	case errors.Is(err, io.EOF):
		return fmt.Errorf("%s: the file is empty", name)
	case err != nil:
		return fmt.Errorf("%s: %s", name, strings.TrimPrefix(err.Error(), "yaml: "))
	}
	if dec.Decode(new(any)) == nil {
		return fmt.Errorf("%s: more than one document", name)
	}
	return nil
}

func unknownKey(name string, row int, key string) error {
	return fmt.Errorf("%s:%d: unknown key %q%s", name, row, key,
		nearest(key, []string{"currency", "decimals", "meters", "tenants", "price", "per"}))
}

// nearest answers " (did you mean x?)" if one of known is close to s.
func nearest(s string, known []string) string {
	best, bestAt := "", 0.6
	for _, k := range known {
		if sim := levenshtein.Similarity(s, k, nil); sim >= bestAt {
			best, bestAt = k, sim
		}
	}
	if best == "" {
		return ": known are " + strings.Join(known, ", ")
	}
	return fmt.Sprintf(" (did you mean %s?)", best)
}
