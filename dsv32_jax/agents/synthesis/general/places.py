"""Real cities, with rounded coordinates.

Written down from general knowledge; latitudes and longitudes to a tenth of a
degree, as any atlas or GeoNames (https://www.geonames.org) has them. Hotels,
restaurants, sights and prices in the environments are invented.
"""

PLACES: dict[str, tuple[tuple[str, float, float], ...]] = {
  'China': (
    ('Hangzhou', 30.3, 120.2),
    ('Shanghai', 31.2, 121.5),
    ('Suzhou', 31.3, 120.6),
    ('Nanjing', 32.1, 118.8),
    ('Ningbo', 29.9, 121.5),
    ('Shaoxing', 30.0, 120.6),
    ('Wuxi', 31.6, 120.3),
    ('Yangzhou', 32.4, 119.4),
    ('Hefei', 31.8, 117.2),
    ('Wuhan', 30.6, 114.3),
    ('Changsha', 28.2, 112.9),
    ('Nanchang', 28.7, 115.9),
  ),
  'France': (
    ('Lyon', 45.8, 4.8),
    ('Dijon', 47.3, 5.0),
    ('Grenoble', 45.2, 5.7),
    ('Avignon', 43.9, 4.8),
    ('Marseille', 43.3, 5.4),
    ('Nice', 43.7, 7.3),
    ('Toulouse', 43.6, 1.4),
    ('Bordeaux', 44.8, -0.6),
    ('Nantes', 47.2, -1.6),
    ('Tours', 47.4, 0.7),
  ),
  'Japan': (
    ('Tokyo', 35.7, 139.7),
    ('Yokohama', 35.4, 139.6),
    ('Nagoya', 35.2, 136.9),
    ('Kyoto', 35.0, 135.8),
    ('Osaka', 34.7, 135.5),
    ('Kobe', 34.7, 135.2),
    ('Hiroshima', 34.4, 132.5),
    ('Okayama', 34.7, 133.9),
    ('Kanazawa', 36.6, 136.7),
    ('Fukuoka', 33.6, 130.4),
  ),
  'Italy': (
    ('Turin', 45.1, 7.7),
    ('Milan', 45.5, 9.2),
    ('Genoa', 44.4, 8.9),
    ('Verona', 45.4, 11.0),
    ('Venice', 45.4, 12.3),
    ('Bologna', 44.5, 11.3),
    ('Florence', 43.8, 11.3),
    ('Pisa', 43.7, 10.4),
    ('Rome', 41.9, 12.5),
    ('Naples', 40.9, 14.3),
  ),
  'Germany': (
    ('Hamburg', 53.6, 10.0),
    ('Bremen', 53.1, 8.8),
    ('Berlin', 52.5, 13.4),
    ('Leipzig', 51.3, 12.4),
    ('Dresden', 51.1, 13.7),
    ('Cologne', 50.9, 7.0),
    ('Frankfurt', 50.1, 8.7),
    ('Nuremberg', 49.5, 11.1),
    ('Stuttgart', 48.8, 9.2),
    ('Munich', 48.1, 11.6),
  ),
}
"""Name, latitude, longitude of cities, by country."""
